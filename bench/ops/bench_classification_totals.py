"""classification_totals: loss, correct answers and images of a batch, added to an epoch's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from harness import Call
from machine import Work
from op_bench import Kernel, OpBench

from skinfast.ops import classification_totals_


@dataclass(frozen=True)
class ClassificationTotalsBench(OpBench):
    """No backward pass: sums in place, made anew here so that every call gives the same."""

    passes = ("forward",)
    modes = ("as stored",)

    def work_of(self, case: str, dtype: str, direction: str) -> Work:
        """Reads logits and labels."""
        rows, classes = self.cases[case]
        return Work(rows * (classes * getattr(torch, dtype).itemsize + 8), rows * classes)

    def build(
        self, case: str, dtype: str, direction: str, device: torch.device, ours: bool, mode: str
    ) -> Call:
        """One op, or PyTorch's six."""
        rows, classes = self.cases[case]
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(rows, classes, generator=generator).to(device, getattr(torch, dtype))
        labels = torch.randint(classes, (rows,), generator=generator).to(device)
        loss = torch.tensor(0.5, device=device)

        def one_op() -> tuple[torch.Tensor, ...]:
            totals = torch.zeros(3, dtype=torch.float64, device=device)
            classification_totals_(totals, loss, logits, labels)
            return (totals,)

        def in_pytorch() -> tuple[torch.Tensor, ...]:
            totals = torch.zeros(3, dtype=torch.float64, device=device)
            totals[0] += loss * rows
            totals[1] += (logits.argmax(1) == labels).sum()
            totals[2] += rows
            return (totals,)

        return one_op if ours else in_pytorch


BENCH = ClassificationTotalsBench(
    name="classification_totals",
    cases={"64x7": (64, 7), "2003x7": (2003, 7)},
    arguments=lambda: (),
    work=lambda: (Work(0, 0), Work(0, 0)),
    layouts=("as stored",),
    dtypes=("float32",),
)

KERNELS = (
    Kernel(
        "classification_totals_kernel",
        "image",
        bytes=7 * 2 + 8,
        operations=7,
        units=256,
        case="256x7",
        shape=(256, 7),
        layout="as stored",
    ),
)
