"""conv2d_relu: the CNN's three convolutions, and one that is left to PyTorch's."""

from machine import Work
from op_bench import Kernel, OpBench, values


def arguments(dtype, n, c, side, k, r):
    """Images (3 channels) need no gradient."""
    images = values(dtype, n, c, side, side, gradient=c != 3)
    return images, values(dtype, k, c, r, r), values(dtype, k), 1, r // 2


def work(n, c, side, k, r):
    """Forward reads x and writes y; backward reads y, its gradient and x, and writes that of x."""
    x, y, weight = n * c * side**2, n * k * side**2, k * c * r**2
    flops = 2 * n * side**2 * weight
    if c == 3:
        return Work(x + y + weight, flops), Work(2 * y + x + weight, flops)
    return Work(x + y + weight, flops), Work(2 * y + 2 * x + 2 * weight, 2 * flops)


BENCH = OpBench(
    name="conv2d_relu",
    cases={
        "64x3x64x64 10 of 3x3": (64, 3, 64, 10, 3),
        "64x10x32x32 10 of 5x5": (64, 10, 32, 10, 5),
        "64x10x10x10 10 of 7x7": (64, 10, 10, 10, 7),
        "64x3x32x32 10 of 3x3": (64, 3, 32, 10, 3),
        "64x10x16x16 10 of 5x5": (64, 10, 16, 10, 5),
        "64x10x5x5 10 of 7x7": (64, 10, 5, 10, 7),
        "64x128x8x8 128 of 3x3": (64, 128, 8, 128, 3),
    },
    arguments=arguments,
    work=work,
)

_SECOND = {
    "case": "256x10x32x32 10 of 5x5",
    "shape": (256, 10, 32, 10, 5),
    "layout": "contiguous",
}
# The CNN's second layer, which has most of its arithmetic; 64 partial sums of 4 images each.
KERNELS = (
    Kernel(
        "small_conv2d_kernel",
        "value of the output",
        bytes=4,
        operations=2 * 10 * 5 * 5,
        units=256 * 10 * 32 * 32,
        **_SECOND,
    ),
    Kernel(
        "small_conv2d_weight_kernel",
        "value of the output",
        bytes=4,
        operations=2 * 10 * 5 * 5,
        units=256 * 10 * 32 * 32,
        direction="training",
        **_SECOND,
    ),
    Kernel(
        "sum_partials_kernel",
        "partial weight",
        bytes=4,
        operations=1,
        units=64 * 10 * 10 * 5 * 5,
        direction="training",
        **_SECOND,
    ),
)
