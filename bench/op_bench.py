"""What a file in bench/ops says about its op, and the calls that are made of it."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import Call
from machine import Work
from torch import Tensor

from skinfast.testing import in_layout

MAPS = ("contiguous", "channels_last")
MATRICES = ("contiguous",)


@dataclass(frozen=True)
class OpBench:
    """The cases of one op.

    Attributes:
        name: of the op, as in skinfast.ops.
        cases: shapes by name; both functions below take a shape's numbers as arguments.
        arguments: dtype and a shape to the positional arguments, on the CPU; those that require
            a gradient get one.
        work: a shape to the work of the forward and of the backward pass, in values (not bytes)
            and operations.
        layouts: that both sides are measured in, MAPS or MATRICES.
        dtypes: as the models use the op; under autocast some stay in float32.
        keywords: further arguments, equal for all cases.
    """

    name: str
    cases: dict[str, tuple[int, ...]]
    arguments: Callable[..., tuple[Any, ...]]
    work: Callable[..., tuple[Work, Work]]
    layouts: tuple[str, ...] = MAPS
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    keywords: dict[str, Any] | None = None

    passes = ("forward", "training")

    @property
    def modes(self) -> tuple[str, ...]:
        """PyTorch's."""
        return self.layouts

    def work_of(self, case: str, dtype: str, direction: str) -> Work:
        """Bytes and operations of a call that ``build`` makes."""
        forward, backward = self.work(*self.cases[case])
        size = getattr(torch, dtype).itemsize
        if direction == "forward":
            return Work(forward.bytes * size, forward.flops)
        return Work((forward.bytes + backward.bytes) * size, forward.flops + backward.flops)

    def build(
        self, case: str, dtype: str, direction: str, device: torch.device, ours: bool, mode: str
    ) -> Call:
        """A call that returns the output and, in training, the gradients, from fixed values."""
        module = importlib.import_module(f"skinfast.ops.{self.name}")
        function = getattr(module, self.name) if ours else module.reference
        torch.manual_seed(0)
        args = tuple(
            _placed(a, device, mode) if isinstance(a, Tensor) else a
            for a in self.arguments(getattr(torch, dtype), *self.cases[case])
        )
        keywords = self.keywords or {}

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*args, **keywords),)

        if direction == "forward":
            return forward
        inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        (output,) = forward()
        grad = torch.empty_like(output).copy_(torch.randn(output.shape))

        def forward_and_backward() -> tuple[Tensor, ...]:
            output = function(*args, **keywords)
            return output.detach(), *torch.autograd.grad(output, inputs, grad)

        return forward_and_backward


@dataclass(frozen=True)
class Kernel:
    """What a ``__global__`` function of an op's room has to do, and a call that launches it.

    Attributes:
        name: of the function.
        unit: what is counted.
        bytes, operations: the least that is moved and computed for one unit.
        units: how many there are in the call.
        case, shape: of the call: a case of the bench, or another with its numbers. As in training
            at batch 256 with images of 64x64, where nothing else is said.
        dtype, layout, direction: of the call.
        instance: part of the template arguments, where a function serves several uses.
        call: makes the call on a device, where it is none of the bench's.
        arithmetic: the dtype whose rate the operations are held against: float32 whatever the
            tensors' dtype, but on tensor cores.
        conv2d: the kernel that computes the call's convolutions (SKINFAST_CONV2D), where it is not
            the one that the table of choices names.
    """

    name: str
    unit: str
    bytes: float
    operations: float
    units: int
    case: str
    shape: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    layout: str = "channels_last"
    direction: str = "forward"
    instance: str = ""
    call: Callable[[torch.device], Call] | None = None
    arithmetic: str = "float32"
    conv2d: str = ""

    def build(self, op: OpBench, device: torch.device) -> Call:
        """The call that launches the kernel."""
        with computed_by(self.conv2d):
            call = self._build(op, device)

        def forced() -> Any:
            with computed_by(self.conv2d):
                return call()

        return forced

    def _build(self, op: OpBench, device: torch.device) -> Call:
        if self.call is not None:
            return self.call(device)
        if self.shape:
            op = replace(op, cases={self.case: self.shape})
        return op.build(self.case, self.dtype, self.direction, device, True, self.layout)

    @property
    def work(self) -> Work:
        """Of a launch."""
        return Work(self.bytes * self.units, self.operations * self.units)


@contextmanager
def computed_by(kernel: str) -> Iterator[None]:
    """Within, convolutions are that kernel's where it can compute them; "" changes nothing."""
    before = os.environ.get("SKINFAST_CONV2D")
    if kernel:
        os.environ["SKINFAST_CONV2D"] = kernel
    try:
        yield
    finally:
        os.environ.pop("SKINFAST_CONV2D", None)
        if before is not None:
            os.environ["SKINFAST_CONV2D"] = before


def values(dtype: torch.dtype, *shape: int, gradient: bool = True) -> Tensor:
    """Normally distributed values."""
    return torch.randn(shape, dtype=torch.float32).to(dtype).requires_grad_(gradient)


def _placed(tensor: Tensor, device: torch.device, mode: str) -> Tensor:
    placed = in_layout(tensor.detach().to(device), mode)
    return placed.requires_grad_(tensor.requires_grad)


def elementwise(reads_and_writes: tuple[int, int], flops: tuple[int, int]) -> Callable[..., Any]:
    """The work of an op that costs so much for every element, forward and backward."""

    def work(*shape: int) -> tuple[Work, Work]:
        n = math.prod(shape)
        forward, backward = (
            Work(moved * n, count * n) for moved, count in zip(reads_and_writes, flops, strict=True)
        )
        return forward, backward

    return work
