"""conv2d_statistics: the 1x1 convolutions of ResNet-50 in training, before their batch norms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import bench_ops
import torch
from harness import Call
from machine import Work
from op_bench import MAPS, Kernel, OpBench, values

from skinfast.ops.conv2d_statistics import conv2d_statistics, reference
from skinfast.testing import in_layout


@dataclass(frozen=True)
class Conv2dStatisticsBench(OpBench):
    """Two outputs; the backward pass is conv2d's."""

    passes = ("forward",)

    def build(
        self, case: str, dtype: str, direction: str, device: torch.device, ours: bool, mode: str
    ) -> Call:
        """Output and statistics."""
        torch.manual_seed(0)
        tensors = self.arguments(getattr(torch, dtype), *self.cases[case])
        x, weight = (in_layout(t.to(device), mode) for t in tensors)
        function = conv2d_statistics if ours else reference

        def call() -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return function(x, weight)

        return call


def arguments(dtype, n, c, side, k):
    return values(dtype, n, c, side, side), values(dtype, k, c, 1, 1)


def work(n, c, side, k):
    x, y, weight = n * c * side**2, n * k * side**2, k * c
    return Work(x + y + weight, 2 * y * c + 3 * y), Work(0, 0)


BENCH = Conv2dStatisticsBench(
    name="conv2d_statistics",
    cases={
        "64x64x16x16 256 of 1x1": (64, 64, 16, 256),
        "64x256x16x16 64 of 1x1": (64, 256, 16, 64),
        "64x256x4x4 1024 of 1x1": (64, 256, 4, 1024),
        "64x512x2x2 2048 of 1x1": (64, 512, 2, 2048),
    },
    arguments=arguments,
    work=work,
    layouts=MAPS,
)


def statistics(device: torch.device) -> Call:
    """A convolution that leaves the sums for the batch norm behind it."""
    op = replace(BENCH, cases={"forward": (256, 64, 16, 256)})
    return op.build("forward", "bfloat16", "forward", device, True, "channels_last")


def gradient(device: torch.device) -> Call:
    """Whose backward pass adds up the sums for the batch norm before the convolution."""
    op = bench_ops.load("batch_norm_relu_conv2d")
    op = replace(op, cases={"training": (256, 64, 16, 256)})
    return op.build("training", "bfloat16", "training", device, True, "channels_last")


_SUMS = {
    "unit": "sum of a tile and channel",
    "bytes": 8,
    "operations": 2,
    "case": "256x64x16x16 256 of 1x1",
    "conv2d": "persistent128x64",
}
KERNELS = (
    Kernel(
        "combine_statistics_kernel",
        units=512 * 256,
        instance="WriteStatistics",
        call=statistics,
        **_SUMS,
    ),
    Kernel(
        "combine_statistics_kernel",
        units=512 * 64,
        instance="SetBackwardChannel",
        call=gradient,
        **_SUMS,
    ),
)
