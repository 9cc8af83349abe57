"""conv2d_add_relu: the ends of ResNet-50's blocks once batch normalisation is folded."""

from machine import Work
from op_bench import MAPS, OpBench, values


def arguments(dtype, n, c, side, k):
    return (
        values(dtype, n, c, side, side),
        values(dtype, k, c, 1, 1),
        values(dtype, k),
        values(dtype, n, k, side, side),
    )


def work(n, c, side, k):
    x, y, weight = n * c * side**2, n * k * side**2, k * c
    flops = 2 * y * c
    forward = Work(x + 2 * y + weight, flops + 2 * y)
    return forward, Work(3 * y + 2 * x + 2 * weight, 2 * flops + y)


BENCH = OpBench(
    name="conv2d_add_relu",
    cases={
        "64x64x16x16 256 of 1x1": (64, 64, 16, 256),
        "64x256x4x4 1024 of 1x1": (64, 256, 4, 1024),
        "64x512x2x2 2048 of 1x1": (64, 512, 2, 2048),
        "64x512x1x1 2048 of 1x1": (64, 512, 1, 2048),
    },
    arguments=arguments,
    work=work,
    layouts=MAPS,
)
