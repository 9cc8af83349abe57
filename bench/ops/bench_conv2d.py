"""conv2d: ResNet-50's convolutions in its late stages, and one that is left to PyTorch's."""

from machine import Work
from op_bench import MAPS, Kernel, OpBench, values


def arguments(dtype, n, c, side, k, r, stride):
    return values(dtype, n, c, side, side), values(dtype, k, c, r, r), None, stride, r // 2


def work(n, c, side, k, r, stride):
    """Products with padding count, as they do for a library that computes them."""
    out = (side - 1) // stride + 1
    x, y, weight = n * c * side**2, n * k * out**2, k * c * r**2
    flops = 2 * y * c * r**2
    return Work(x + y + weight, flops), Work(2 * y + 2 * x + 2 * weight, 2 * flops)


BENCH = OpBench(
    name="conv2d",
    cases={
        "64x64x16x16 256 of 1x1": (64, 64, 16, 256, 1, 1),
        "64x256x4x4 1024 of 1x1": (64, 256, 4, 1024, 1, 1),
        "64x1024x4x4 2048 of 1x1 stride 2": (64, 1024, 4, 2048, 1, 2),
        "64x512x2x2 512 of 3x3": (64, 512, 2, 512, 3, 1),
        "64x2048x1x1 512 of 1x1": (64, 2048, 1, 512, 1, 1),
        "64x512x1x1 512 of 3x3": (64, 512, 1, 512, 3, 1),
        "64x64x16x16 64 of 3x3": (64, 64, 16, 64, 3, 1),
    },
    arguments=arguments,
    work=work,
    layouts=MAPS,
)

KERNELS = (
    Kernel(
        "sum_slices_kernel",
        "partial weight",
        bytes=4,
        operations=1,
        units=8 * 9 * 512 * 512,
        case="256x512x2x2 512 of 3x3",
        shape=(256, 512, 2, 512, 3, 1),
        direction="training",
    ),
)
