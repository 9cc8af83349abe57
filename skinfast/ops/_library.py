"""Loads the compiled ops and holds what every op's Python side shares."""

from __future__ import annotations

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


def is_batch_last(x: Tensor) -> bool:
    """Whether x ``[N, C, H, W]`` is stored as ``[C, H, W, N]``, and in neither common layout."""
    return (
        x.dim() == 4
        and x.numel() > 0
        and not x.is_contiguous()
        and not x.is_contiguous(memory_format=torch.channels_last)
        and x.permute(1, 2, 3, 0).is_contiguous()
    )


def empty_in_layout_of(x: Tensor, shape: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of ``shape`` (default: that of x) in the layout that an op on x returns."""
    shape = x.shape if shape is None else shape
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=layout_of(x))


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
            tensors = [args[i] for i in positions if _castable(args[i])]
            if dtype_for is not None:
                dtype = dtype_for(device)
            else:
                dtype = tensors[0].dtype
                for tensor in tensors[1:]:
                    dtype = torch.promote_types(dtype, tensor.dtype)
            arguments = [
                a.to(dtype) if i in positions and _castable(a) else a for i, a in enumerate(args)
            ]
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
