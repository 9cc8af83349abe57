"""linear_relu: the CNN's dense layers."""

from machine import Work
from op_bench import MATRICES, Kernel, OpBench, values


def arguments(dtype, n, c, k):
    return values(dtype, n, c), values(dtype, k, c), values(dtype, k)


def work(n, c, k):
    """Two products backward: the gradients of input and weight."""
    flops = 2 * n * c * k
    forward = Work(n * c + n * k + k * c, flops)
    return forward, Work(2 * n * c + 2 * n * k + 2 * k * c, 2 * flops)


BENCH = OpBench(
    name="linear_relu",
    cases={
        "64x40 to 120": (64, 40, 120),
        "64x10 to 120": (64, 10, 120),
        "64x120 to 64": (64, 120, 64),
    },
    arguments=arguments,
    work=work,
    layouts=MATRICES,
)

KERNELS = (
    Kernel(
        "mask_and_sum_columns_kernel",
        "value of the output",
        bytes=6,
        operations=2,
        units=256 * 120,
        case="256x40 to 120",
        shape=(256, 40, 120),
        layout="contiguous",
        direction="training",
    ),
)
