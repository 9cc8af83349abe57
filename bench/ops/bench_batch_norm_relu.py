"""batch_norm_relu: in ResNet-50's blocks, its stem, and on the logistic regression's pixels."""

import torch
from op_bench import OpBench, elementwise, values


def arguments(dtype, *shape):
    """Statistics and parameters stay in float32 under autocast."""
    channels = shape[1]
    statistics = torch.zeros(channels), torch.ones(channels)
    weight, bias = (values(torch.float32, channels) for _ in range(2))
    return values(dtype, *shape), *statistics, weight, bias, True


BENCH = OpBench(
    name="batch_norm_relu",
    cases={
        "64x64x32x32": (64, 64, 32, 32),
        "64x64x16x16": (64, 64, 16, 16),
        "64x256x4x4": (64, 256, 4, 4),
        "64x512x2x2": (64, 512, 2, 2),
        "64x512x1x1": (64, 512, 1, 1),
        "64x12288": (64, 12288),
    },
    arguments=arguments,
    # Two passes each way: statistics, then the result; sums of the gradient, then the gradient.
    work=elementwise((3, 5), flops=(7, 9)),
)
