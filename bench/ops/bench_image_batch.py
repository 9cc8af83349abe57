"""image_batch: a batch from the pixels that stay on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from harness import Call
from machine import Work
from op_bench import Kernel, OpBench

from skinfast.ops import image_batch

_IMAGES = 2048


@dataclass(frozen=True)
class ImageBatchBench(OpBench):
    """A gather without gradient, from bytes."""

    passes = ("forward",)
    modes = ("contiguous", "channels_last")

    def work_of(self, case: str, dtype: str, direction: str) -> Work:
        """Reads a byte a value and writes a value."""
        batch, side = self.cases[case]
        count = batch * 3 * side**2
        return Work(count * (1 + getattr(torch, dtype).itemsize), 2 * count)

    def build(
        self, case: str, dtype: str, direction: str, device: torch.device, ours: bool, mode: str
    ) -> Call:
        """The same images and labels: by one op, or by PyTorch's gathers and arithmetic."""
        batch, side = self.cases[case]
        generator = torch.Generator().manual_seed(0)
        shape = (_IMAGES, side, side, 3)
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device)
        indices = torch.randint(_IMAGES, (batch,), generator=generator).to(device)
        labels = torch.randint(7, (_IMAGES,), generator=generator).to(device)
        scale, shift = (torch.tensor(v, device=device) for v in ([0.02] * 3, [-2.0] * 3))
        kind = getattr(torch, dtype)
        if ours:
            clock = torch.zeros(2, dtype=torch.int64, device=device)
            arguments = (images, labels, indices, scale, shift)
            return lambda: image_batch(*arguments, clock=clock, layout=mode, dtype=kind)

        def gather() -> tuple[torch.Tensor, ...]:
            planes = images.index_select(0, indices).permute(0, 3, 1, 2)
            if mode == "contiguous":
                planes = planes.contiguous()
            channels = scale.view(3, 1, 1), shift.view(3, 1, 1)
            batch_images = torch.addcmul(channels[1], planes.float(), channels[0]).to(kind)
            return batch_images, labels.index_select(0, indices)

        return gather


BENCH = ImageBatchBench(
    name="image_batch",
    cases={"64 of 64x64": (64, 64), "64 of 32x32": (64, 32)},
    arguments=lambda: (),
    work=lambda: (Work(0, 0), Work(0, 0)),
    layouts=("contiguous", "channels_last"),
    dtypes=("float32",),
)

KERNELS = (
    Kernel(
        "image_batch_kernel",
        "value",
        bytes=5,
        operations=2,
        units=256 * 3 * 64 * 64,
        case="256 of 64x64",
        shape=(256, 64),
        dtype="float32",
    ),
    Kernel(
        "image_batch_kernel",
        "byte",
        bytes=2,
        operations=0,
        units=256 * 3 * 64 * 64,
        case="256 of 64x64",
        shape=(256, 64),
        dtype="uint8",
        instance="unsigned char",
        layout="contiguous",
    ),
)
