"""adam: one step for all parameters of a model, as a list and as one flat tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from harness import Call
from machine import Work
from op_bench import Kernel, OpBench

from skinfast import arena
from skinfast.models import build_model
from skinfast.optim import Adam

FLAT = "one tensor"


@dataclass(frozen=True)
class AdamBench(OpBench):
    """No forward and backward pass: a step in place."""

    passes = ("step",)
    modes = ("Adam()", "Adam(fused=True)")

    def work_of(self, case: str, dtype: str, direction: str) -> Work:
        """Reads parameter, gradient and two moments, writes all but the gradient: 28 bytes."""
        with torch.device("meta"):
            count = sum(p.numel() for p in build_model(case).parameters())
        return Work(7 * 4 * count, 12 * count)

    def build(
        self, case: str, dtype: str, direction: str, device: torch.device, ours: bool, mode: str
    ) -> Call:
        """A step from fixed gradients, which returns the parameters."""
        torch.manual_seed(0)
        parameters = list(build_model(case).to(device).parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        if mode == FLAT:
            return _flat_step(parameters)
        if ours:
            optimizer: torch.optim.Optimizer = Adam(parameters)
        else:
            optimizer = torch.optim.Adam(
                parameters,
                fused=True if "fused" in mode else None,
                capturable=device.type == "cuda",  # as in a step that is a CUDA graph
            )

        def step() -> list[torch.Tensor]:
            optimizer.step()
            return parameters

        return step


def _flat_step(parameters: list[torch.nn.Parameter]) -> Call:
    """The same step on one tensor that holds them all."""
    values, grads = arena.zeros_like(parameters), arena.zeros_like(parameters)
    for parameter, value, grad in zip(parameters, values, grads, strict=True):
        value.copy_(parameter.detach())
        assert parameter.grad is not None
        grad.copy_(parameter.grad)
    (flat,), (flat_grad,) = arena.flat(values), arena.flat(grads)
    flat.requires_grad_().grad = flat_grad
    optimizer = Adam([flat])

    def step() -> list[torch.Tensor]:
        optimizer.step()
        return values

    return step


BENCH = AdamBench(
    name="adam",
    cases={"resnet50": (), "cnn": (), "logistic-regression": ()},
    arguments=lambda: (),
    work=lambda: (Work(0, 0), Work(0, 0)),
    layouts=("as stored", FLAT),
    dtypes=("float32",),
)

_STEP = {"case": "resnet50", "dtype": "float32", "layout": "as stored", "direction": "step"}
KERNELS = (
    Kernel("advance_steps_kernel", "parameter tensor", bytes=8, operations=1, units=161, **_STEP),
    Kernel("adam_kernel", "parameter", bytes=28, operations=12, units=23_522_375, **_STEP),
)
