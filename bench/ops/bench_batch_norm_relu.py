"""batch_norm_relu: in ResNet-50's blocks, its stem, and on the logistic regression's pixels."""

import torch
from harness import Call
from op_bench import Kernel, OpBench, elementwise, values

from skinfast.ops import batch_norm_relu


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


def evaluation(device: torch.device) -> Call:
    """With the running statistics, on maps that cost next to nothing."""
    values_of_one = torch.zeros(1, 2048, 1, 1, device=device)
    statistics = torch.zeros(2048, device=device), torch.ones(2048, device=device)
    return lambda: (batch_norm_relu(values_of_one, *statistics),)


_MAP = {"case": "256x256x16x16", "shape": (256, 256, 16, 16)}
_VALUES = _MAP | {"unit": "value of x", "units": 256 * 256 * 16 * 16}
_BACKWARD = _VALUES | {"direction": "training"}
# A mask is a bit a value. Partial results: 1041 of a channel by rows, 4 floats or 2 each.
KERNELS = (
    Kernel("reduce_rows_kernel", bytes=2, operations=4, instance="ForwardReduction", **_VALUES),
    Kernel(
        "reduce_rows_kernel", bytes=4.125, operations=4, instance="BackwardReduction", **_BACKWARD
    ),
    Kernel(
        "reduce_channel_kernel",
        bytes=2,
        operations=4,
        layout="contiguous",
        instance="ForwardReduction",
        **_VALUES,
    ),
    Kernel(
        "reduce_channel_kernel",
        bytes=4.125,
        operations=4,
        layout="contiguous",
        instance="BackwardReduction",
        **_BACKWARD,
    ),
    Kernel(
        "combine_kernel",
        "partial result of a channel",
        bytes=16,
        operations=12,
        units=1041 * 256,
        instance="ForwardReduction",
        **_MAP,
    ),
    Kernel("apply_rows_kernel", bytes=4.125, operations=4, instance="ForwardPass", **_VALUES),
    Kernel("apply_rows_kernel", bytes=6.125, operations=5, instance="BackwardPass", **_BACKWARD),
    Kernel(
        "apply_kernel",
        bytes=4.125,
        operations=4,
        layout="contiguous",
        instance="ForwardPass",
        **_VALUES,
    ),
    Kernel(
        "apply_kernel",
        bytes=6.125,
        operations=5,
        layout="contiguous",
        instance="BackwardPass",
        **_BACKWARD,
    ),
    # Reads both running statistics; writes mean, variance, scale and shift.
    Kernel(
        "evaluation_kernel",
        "channel",
        bytes=24,
        operations=4,
        units=2048,
        case="1x2048x1x1",
        call=evaluation,
    ),
    Kernel("update_kernel", "channel", bytes=24, operations=8, units=256, **_MAP),
)
