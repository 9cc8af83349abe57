"""conv2d_relu_max_pool2d: the CNN's three layers at both sizes."""

from machine import Work
from op_bench import OpBench, values


def arguments(dtype, n, c, side, k, r, pool):
    """Images (3 channels) need no gradient."""
    images = values(dtype, n, c, side, side, gradient=c != 3)
    return images, values(dtype, k, c, r, r), values(dtype, k), r // 2, pool


def work(n, c, side, k, r, pool):
    """Bytes of positions are not counted; backward multiplies for one pixel of each window."""
    x, y, weight = n * c * side**2, n * k * (side // pool) ** 2, k * c * r**2
    flops = 2 * n * (side // pool * pool) ** 2 * weight
    backward = flops // pool**2
    if c == 3:
        return Work(x + y + weight, flops), Work(2 * y + x + weight, backward)
    return Work(x + y + weight, flops), Work(2 * y + 2 * x + 2 * weight, 2 * backward)


BENCH = OpBench(
    name="conv2d_relu_max_pool2d",
    cases={
        "64x3x64x64 10 of 3x3 pool 2": (64, 3, 64, 10, 3, 2),
        "64x10x32x32 10 of 5x5 pool 3": (64, 10, 32, 10, 5, 3),
        "64x10x10x10 10 of 7x7 pool 4": (64, 10, 10, 10, 7, 4),
        "64x3x32x32 10 of 3x3 pool 2": (64, 3, 32, 10, 3, 2),
        "64x10x16x16 10 of 5x5 pool 3": (64, 10, 16, 10, 5, 3),
        "64x10x5x5 10 of 7x7 pool 4": (64, 10, 5, 10, 7, 4),
    },
    arguments=arguments,
    work=work,
)
