"""batch_norm_relu_max_pool2d: ResNet-50's stem, from images of 64x64, 32x32 and 224x224."""

import torch
from machine import Work
from op_bench import OpBench, values


def arguments(dtype, *shape):
    """Statistics and parameters stay in float32 under autocast."""
    channels = shape[1]
    statistics = torch.zeros(channels), torch.ones(channels)
    weight, bias = (values(torch.float32, channels) for _ in range(2))
    return values(dtype, *shape), *statistics, weight, bias, True


def work(n, c, height, width):
    """Each way x is read twice; forward the output is written, backward its gradient read twice."""
    x = n * c * height * width
    y = x // 4
    return Work(2 * x + y, 7 * x + 8 * y), Work(3 * x + 2 * y, 9 * x + 2 * y)


BENCH = OpBench(
    name="batch_norm_relu_max_pool2d",
    cases={
        "64x64x32x32": (64, 64, 32, 32),
        "64x64x16x16": (64, 64, 16, 16),
        "8x64x112x112": (8, 64, 112, 112),
    },
    arguments=arguments,
    work=work,
    keywords={"kernel_size": 3, "stride": 2, "padding": 1},
)
