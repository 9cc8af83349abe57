"""batch_norm_add_relu: the ends of ResNet-50's blocks."""

import torch
from op_bench import OpBench, elementwise, values


def arguments(dtype, *shape):
    """Statistics and parameters stay in float32 under autocast."""
    channels = shape[1]
    statistics = torch.zeros(channels), torch.ones(channels)
    weight, bias = (values(torch.float32, channels) for _ in range(2))
    return values(dtype, *shape), values(dtype, *shape), *statistics, weight, bias, True


BENCH = OpBench(
    name="batch_norm_add_relu",
    cases={
        "64x256x16x16": (64, 256, 16, 16),
        "64x1024x4x4": (64, 1024, 4, 4),
        "64x2048x2x2": (64, 2048, 2, 2),
        "64x2048x1x1": (64, 2048, 1, 1),
    },
    arguments=arguments,
    # As batch_norm_relu, and the residual is read and its gradient written.
    work=elementwise((4, 6), flops=(8, 9)),
)
