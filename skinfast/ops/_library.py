"""Loads the compiled ops and holds what every op's Python side shares."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skinfast.errors import SkinfastError

_PATH = Path(__file__).resolve().parent.parent / "_ops.so"
if not _PATH.is_file():
    raise SkinfastError(
        "the compiled ops are missing (skinfast/_ops.so); install the package with `pip install .`"
    )
torch.ops.load_library(_PATH)


class SampleInput(NamedTuple):
    """One call of an op for parity checks; tensors that require a gradient are checked for it."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout an op computes in: as stored where that is dense, contiguous otherwise.

    The twin of ``layout_of`` in csrc/core/tensor.h, for the fake kernels.
    """
    if (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.channels_last
    return torch.contiguous_format


def empty_in_layout_of(x: Tensor, shape: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of ``shape`` (default: that of x) in the layout that an op on x returns."""
    shape = x.shape if shape is None else shape
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=layout_of(x))


# --- convolutions ---------------------------------------------------------------------------------


def conv2d_layout(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout of a convolution's output: channels_last as soon as either operand is."""
    layout = layout_of(input)
    return layout if layout == torch.channels_last else layout_of(weight)


def conv2d_output_shape(
    input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """[N, K, P, Q]."""
    extents = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in extents]
    return [input.shape[0], weight.shape[0], *spatial]


def pair(op: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """A vertical and a horizontal number.

    Raises:
        RuntimeError: something else than one or two numbers.
    """
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise RuntimeError(f"{op}: {tuple(value)} was given where one or two numbers fit")
    return value[0], value[1]


def symmetric_padding(
    op: str,
    padding: int | tuple[int, int] | str,
    weight: Tensor,
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Padding in numbers, where it is equal on both sides.

    Raises:
        RuntimeError: an unknown word, or "same" where the sides would differ.
    """
    if not isinstance(padding, str):
        return pair(op, padding)
    if padding == "valid":
        return 0, 0
    if padding != "same":
        raise RuntimeError(f"{op}: padding is {padding!r}; it needs 'same', 'valid' or numbers")
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if stride != (1, 1) or any(total % 2 for total in totals):
        raise RuntimeError(
            f"{op}: padding='same' needs stride 1 and an odd kernel; pad the input instead"
        )
    return totals[0] // 2, totals[1] // 2


# --- registration ---------------------------------------------------------------------------------


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``torch.library.register_fake`` for an op whose tensors must all be on one device.

    The fake kernel is the meta device's too, and a call that mixes that with another device lands
    here: unchecked it would return memory that nobody wrote.
    """

    def decorate(fake: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(fake).parameters)

        @functools.wraps(fake)
        def checked(*args: Any) -> Any:
            tensors = [(n, a) for n, a in zip(names, args, strict=False) if isinstance(a, Tensor)]
            first_name, first = tensors[0]
            for name, tensor in tensors[1:]:
                if tensor.device != first.device:
                    raise RuntimeError(
                        f"{op}: {name} and {first_name} are on different devices; "
                        "move one with .to()"
                    )
            return fake(*args)

        return torch.library.register_fake(f"skinfast::{op}", checked)

    return decorate


def refuse_double_backward(op: str) -> None:
    """Make a second differentiation through ``op`` an error instead of a wrong zero."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{op} cannot be differentiated again; use backend='torch' for second derivatives"
        )

    torch.library.register_autograd(f"skinfast::{op}", backward)


def register_lower_precision(op: str, *argument_positions: int) -> None:
    """Under autocast, run ``op`` in the autocast dtype, as torch does for its convolutions.

    The floating-point tensors at ``argument_positions`` are cast; float64 is left alone, as in
    torch.
    """
    _register_autocast(op, argument_positions, lambda device: torch.get_autocast_dtype(device))


def register_float32(op: str, *argument_positions: int) -> None:
    """Under autocast, run ``op`` in float32, as torch does for its losses."""
    _register_autocast(op, argument_positions, lambda device: torch.float32)


def register_promotion(op: str, *argument_positions: int) -> None:
    """Under autocast, bring the tensors to their widest dtype, as torch does for its additions."""
    _register_autocast(op, argument_positions, None)


_AUTOCAST = torch.library.Library("skinfast", "IMPL")


def _register_autocast(
    op: str, positions: tuple[int, ...], dtype_for: Callable[[str], torch.dtype] | None
) -> None:
    overload = getattr(torch.ops.skinfast, op).default

    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*args: Any, device: str = device, **kwargs: Any) -> Any:
            if dtype_for is not None:
                dtype = dtype_for(device)
                cast = [i for i in positions if _castable(args[i])]
            else:
                cast = [i for i in positions if isinstance(args[i], Tensor)]
                dtype = functools.reduce(torch.promote_types, (args[i].dtype for i in cast))
            arguments = [a.to(dtype) if i in cast else a for i, a in enumerate(args)]
            keys = torch._C.DispatchKeySet(
                torch._C.DispatchKey.AutocastCPU
            ) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return overload(*arguments, **kwargs)

        _AUTOCAST.impl(op, kernel, key)


def _castable(argument: Any) -> bool:
    return (
        isinstance(argument, Tensor)
        and argument.is_floating_point()
        and argument.dtype != torch.float64
    )
