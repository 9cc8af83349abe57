"""What a machine can do at its best, measured in the run that is held against it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from harness import Call, Stopwatch, take_turns

from skinfast import _host
from skinfast.testing import full_float32


@dataclass(frozen=True)
class Work:
    """The least bytes that have to be moved, and floating-point operations."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached in this run.

    Attributes:
        bandwidth: bytes a second, read and written: the better of copying a large tensor and of
            scaling one in place (some CPUs read what a copy is going to overwrite).
        flops: operations a second by dtype: the better of a matrix product and a 3x3 convolution
            (on some CPUs one library is far slower than the other). Float32 is that, not TF32.
            A CPU without bfloat16 arithmetic computes bfloat16 best in float32.
    """

    bandwidth: float
    flops: dict[str, float]

    def floor(self, work: Work, dtype: str) -> float:
        """Seconds that ``work`` takes at the least."""
        return max(work.bytes / self.bandwidth, work.flops / self.flops[dtype])


def measure_ceilings(device: torch.device, watch: Stopwatch, rounds: int) -> Ceilings:
    """Bandwidth and arithmetic rates of a device: the best round of each."""
    scale = 4 if device.type == "cuda" else 1
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {
        "copy": partial(target.copy_, source),
        "in place": partial(target.mul_, 1.0),
    }
    operations = {}
    side, batch, channels = 2048 * scale, 64 * scale, 128
    has_bfloat16 = device.type == "cuda" or "bf16" in _host.cpu_instruction_set()
    for dtype in (torch.float32, torch.bfloat16) if has_bfloat16 else (torch.float32,):
        name = str(dtype).removeprefix("torch.")
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        maps, kernel = (
            torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            for shape in ((batch, channels, 16, 16), (channels, channels, 3, 3))
        )
        calls[f"{name} matrix product"] = partial(torch.mm, matrix, matrix)
        calls[f"{name} convolution"] = partial(torch.conv2d, maps, kernel, padding=1)
        operations[f"{name} matrix product"] = 2 * side**3
        operations[f"{name} convolution"] = 2 * maps.numel() * kernel[0].numel()
    with torch.no_grad(), full_float32():
        best = {
            name: min(timing.samples) for name, timing in take_turns(calls, watch, rounds).items()
        }
    flops: dict[str, float] = {}
    for name, count in operations.items():
        dtype_name = name.split()[0]
        flops[dtype_name] = max(flops.get(dtype_name, 0), count / best[name])
    flops.setdefault("bfloat16", flops["float32"])
    return Ceilings(2 * source.nbytes / min(best["copy"], best["in place"]), flops)
