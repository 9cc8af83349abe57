"""``skinfast selfcheck``: does this installation compute what pure PyTorch computes?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch

from skinfast import testing
from skinfast.models import MODELS, build_model
from skinfast.nn import CrossEntropyLoss
from skinfast.optim import Adam


@dataclass(frozen=True)
class Check:
    """One line of the table; ``failure`` is empty where all calls agreed."""

    subject: str
    device: str
    dtype: str
    calls: int
    failure: str

    @property
    def passed(self) -> bool:
        return not self.failure


def selfcheck() -> list[Check]:
    """Hold every op, the optimizer and a training step of every model against pure PyTorch.

    On every device found, in every dtype and layout, by the rules of ``skinfast.testing``.
    """
    return [*_check_ops(), *_check_optimizer(), *_check_models()]


def _check_ops() -> Iterator[Check]:
    cases = testing.parity_cases()
    for (name, device, dtype), group in groupby(cases, key=lambda c: (c[0], c[2], c[3])):
        calls, failure = 0, ""
        for _, module, _, _, layout, sample in group:
            calls += 1
            stored = testing.map_tensors(sample, partial(testing.in_layout, layout=layout))
            try:
                testing.assert_parity(module, name, stored, dtype)
            except (AssertionError, RuntimeError) as error:
                failure = failure or f"{sample.name}, {layout}: {_one_line(error)}"
        yield Check(name, device, _name(dtype), calls, failure)


def _check_optimizer(steps: int = 100) -> Iterator[Check]:
    for device in testing.devices():
        ours, theirs = (
            [
                torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
                for shape in [(10, 3, 3, 3), (120, 40), (7,)]
            ]
            for _ in range(2)
        )
        optimizers = Adam(ours, lr=0.01), torch.optim.Adam(theirs, lr=0.01)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            for a, b in zip(ours, theirs, strict=True):
                a.grad = torch.randn(a.shape, generator=generator).to(device)
                b.grad = a.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        # A parameter that comes near zero keeps the rounding of when it was 1: up to 5.3e-8 seen.
        yield _compare("adam_", device, torch.float32, steps, ours, theirs, rtol=1e-6, atol=1e-7)


def _check_models() -> Iterator[Check]:
    """One step from equal weights; in float64, where any difference is a fault, not rounding."""
    for device in testing.devices():
        for name in MODELS:
            results = []
            for backend in ("skinfast", "torch"):
                torch.manual_seed(0)
                model = build_model(name, image_size=32, backend=backend).to(device).double()
                images = torch.randn(4, 3, 32, 32, dtype=torch.float64).to(device)
                labels = torch.tensor([0, 4, 5, 5], device=device)
                optimizer: torch.optim.Optimizer = (
                    Adam(model.parameters())
                    if backend == "skinfast"
                    else torch.optim.Adam(model.parameters())
                )
                loss = CrossEntropyLoss(backend=backend)(model(images), labels)
                loss.backward()
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                optimizer.step()
                results.append([loss.detach(), *gradients, *model.state_dict().values()])
            ours, theirs = results
            # With four images a channel's variance can be tiny, and batch norm magnifies rounding:
            # PyTorch's own two layouts differ by 1.5e-11 of ResNet-50's largest gradient.
            largest = max(1.0, *(float(value.abs().max()) for value in theirs))
            yield _compare(
                f"{name} step",
                device,
                torch.float64,
                1,
                ours,
                theirs,
                rtol=1e-6,
                atol=1e-10 * largest,
            )


def _compare(
    subject: str, device: str, dtype: torch.dtype, calls: int, ours: Any, theirs: Any, **limits: Any
) -> Check:
    try:
        torch.testing.assert_close(ours, theirs, **limits)
    except AssertionError as error:
        return Check(subject, device, _name(dtype), calls, _one_line(error))
    return Check(subject, device, _name(dtype), calls, "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
