"""batch_norm_relu_conv2d: the last convolutions of ResNet-50's blocks, and the norms before."""

import torch
from machine import Work
from op_bench import OpBench, values


def arguments(dtype, n, c, side, k):
    """Statistics and parameters of the batch norm stay in float32 under autocast."""
    statistics = torch.zeros(c), torch.ones(c)
    norm_weight, norm_bias = (values(torch.float32, c) for _ in range(2))
    x, weight = values(dtype, n, c, side, side), values(dtype, k, c, 1, 1)
    return x, *statistics, norm_weight, norm_bias, weight, True


def work(n, c, side, k):
    """Backward: the weight's gradient, then the input's with both sums, then batch norm's pass."""
    x, y, weight = n * c * side**2, n * k * side**2, k * c
    forward = Work(4 * x + y + weight, 7 * x + 2 * y * c)
    return forward, Work((x + y + weight) + (y + weight + 2 * x) + 3 * x, 4 * y * c + 9 * x)


BENCH = OpBench(
    name="batch_norm_relu_conv2d",
    cases={
        "64x64x16x16 256 of 1x1": (64, 64, 16, 256),
        "64x128x8x8 512 of 1x1": (64, 128, 8, 512),
        "64x256x4x4 1024 of 1x1": (64, 256, 4, 1024),
        "64x512x2x2 2048 of 1x1": (64, 512, 2, 2048),
    },
    arguments=arguments,
    work=work,
)
