"""linear: the last layers of the CNN and of ResNet-50."""

from machine import Work
from op_bench import MATRICES, OpBench, values


def arguments(dtype, n, c, k):
    return values(dtype, n, c), values(dtype, k, c), values(dtype, k)


def work(n, c, k):
    """Two products backward: the gradients of input and weight."""
    flops = 2 * n * c * k
    forward = Work(n * c + n * k + k * c, flops)
    return forward, Work(2 * n * c + n * k + 2 * k * c, 2 * flops)


BENCH = OpBench(
    name="linear",
    cases={"64x64 to 7": (64, 64, 7), "64x2048 to 7": (64, 2048, 7)},
    arguments=arguments,
    work=work,
    layouts=MATRICES,
)
