"""Parity with pure PyTorch: what the tests, the benchmarks and ``skinfast selfcheck`` share.

An op is compared on the calls that its module's ``sample_inputs`` lists, against the module's
``reference`` in pure PyTorch. The rules (docs/numerics.md):

* float32 and float64: ``torch.testing.assert_close`` with its defaults, or the op's own
  ``TOLERANCES`` where a need was measured;
* bfloat16 and float16: the error against float64 is at most twice that of PyTorch's own op.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skinfast.ops._library import SampleInput

LAYOUTS = ("contiguous", "channels_last", "strided")
LOW_PRECISION_FACTOR = 2.0


def devices() -> list[str]:
    """The devices that the ops can be checked on here: "cpu", and "cuda" where there is a GPU."""
    cuda = torch.cuda.is_available() and has_cuda_kernels()
    return ["cpu", "cuda"] if cuda else ["cpu"]


def has_cuda_kernels() -> bool:
    """Whether this build of skinfast has its CUDA kernels linked in."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("skinfast::add_relu", "CUDA")


def dtypes(device: str) -> list[torch.dtype]:
    """The dtypes that every op supports on a device."""
    common = [torch.float32, torch.float64, torch.bfloat16]
    return [*common, torch.float16] if device == "cuda" else common


def op_modules() -> dict[str, ModuleType]:
    """Every differentiable op's module under ``skinfast.ops``, by the op's name."""
    import skinfast.ops

    names = [m.name for m in pkgutil.iter_modules(skinfast.ops.__path__) if m.name[0] != "_"]
    modules = {name: importlib.import_module(f"skinfast.ops.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "reference")}


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of equal values and gradient needs, stored in another way.

    "strided" is a view that starts at an odd offset of a larger, NaN-filled buffer and has gaps;
    "offset" has none, but starts at an odd element, where no wide access is possible.
    """
    source = tensor.detach()
    if layout == "channels_last" and source.dim() == 4:
        copy = source.contiguous(memory_format=torch.channels_last)
    elif layout == "strided" and source.dim() > 0:
        *leading, last = source.shape
        buffer = source.new_full((*leading, 2 * last + 1), _filler(source.dtype))
        copy = buffer[..., 1::2]
        copy.copy_(source)
    elif layout == "offset":
        copy = source.new_full((source.numel() + 2,), _filler(source.dtype))[1:-1].view_as(source)
        copy.copy_(source)
    else:
        copy = source.clone(memory_format=torch.contiguous_format)
    return copy.requires_grad_(tensor.requires_grad)


def _filler(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else 0


def map_tensors(sample: SampleInput, change: Callable[[Tensor], Tensor]) -> SampleInput:
    """The same call with every tensor argument replaced by ``change(tensor)``."""

    def convert(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    args = tuple(convert(value) for value in sample.args)
    return SampleInput(sample.name, args, {k: convert(v) for k, v in sample.kwargs.items()})


def to_dtype(sample: SampleInput, dtype: torch.dtype) -> SampleInput:
    """The same call with every floating-point tensor in ``dtype``."""

    def convert(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().clone()
        return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)

    return map_tensors(sample, convert)


def outputs_and_gradients(function: Callable[..., Any], sample: SampleInput) -> dict[str, Tensor]:
    """Run a call forward and backward: its outputs and the gradients of its inputs, by name.

    The gradient that is fed in is random with a fixed seed, equal for equal shapes.
    """
    result = function(*sample.args, **sample.kwargs)
    outputs = result if isinstance(result, tuple) else (result,)
    values = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    named = {**{f"argument {i}": a for i, a in enumerate(sample.args)}, **sample.kwargs}
    inputs = {n: t for n, t in named.items() if isinstance(t, Tensor) and t.requires_grad}
    differentiable = [output for output in outputs if output.requires_grad]
    if inputs and differentiable:
        generator = torch.Generator().manual_seed(1)
        feeds = [
            torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
            for y in differentiable
        ]
        grads = torch.autograd.grad(differentiable, list(inputs.values()), feeds)
        values |= {f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return values


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 in float32: on a GPU, cuDNN rounds their operands to TF32 by default."""
    switches: tuple[Any, ...] = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def assert_parity(module: ModuleType, name: str, sample: SampleInput, dtype: torch.dtype) -> None:
    """Hold an op's outputs and gradients on one call against its pure PyTorch reference.

    Raises:
        AssertionError: they differ by more than this module's rules allow.
    """
    function = getattr(module, name)
    with full_float32():
        actual = outputs_and_gradients(function, sample)
        expected = outputs_and_gradients(module.reference, to_dtype(sample, dtype))
    assert actual.keys() == expected.keys()
    if dtype in (torch.float32, torch.float64):
        tolerances = getattr(module, "TOLERANCES", {}).get(dtype, {})
        for key, value in actual.items():
            torch.testing.assert_close(
                value, expected[key], **tolerances, equal_nan=True, msg=f"{key}: {{}}".format
            )
        return
    exact = outputs_and_gradients(module.reference, to_dtype(sample, torch.float64))
    factors = getattr(module, "LOW_PRECISION_FACTORS", {})
    factor = factors.get(dtype, LOW_PRECISION_FACTOR)
    for key, value in actual.items():
        assert value.dtype == expected[key].dtype, f"{key} is {value.dtype}"
        assert value.shape == expected[key].shape, f"{key} has shape {tuple(value.shape)}"
        ours, theirs = (_largest_error(v, exact[key]) for v in (value, expected[key]))
        assert ours <= factor * theirs, (
            f"{key}: error {ours:.3g} against float64, PyTorch's own is {theirs:.3g}"
        )


def _largest_error(value: Tensor, exact: Tensor) -> float:
    difference = (value.double() - exact.double()).abs()
    return difference.max().item() if difference.numel() else 0.0


class RecordOps(TorchDispatchMode):
    """Collects every call of a skinfast op made while it is active: (overload, args, kwargs)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "skinfast":
            self.calls.append((func, args, kwargs))
        return func(*args, **kwargs)


def parity_cases(
    of_devices: Mapping[str, Sequence[torch.dtype]] | None = None,
) -> Iterator[tuple[str, ModuleType, str, torch.dtype, str, SampleInput]]:
    """Every (op, module, device, dtype, layout, sample) that has a reference to be held against.

    Args:
        of_devices: dtypes by device; default: all devices here with all that the ops support there.
    """
    if of_devices is None:
        of_devices = {device: dtypes(device) for device in devices()}
    for name, module in op_modules().items():
        for device, kinds in of_devices.items():
            for dtype in kinds:
                for sample in module.sample_inputs(device, dtype):
                    for layout in LAYOUTS:
                        if layout == "channels_last" and not _has_4d(sample):
                            continue
                        yield name, module, device, dtype, layout, sample


def _has_4d(sample: SampleInput) -> bool:
    return any(isinstance(a, Tensor) and a.dim() == 4 for a in sample.args)
