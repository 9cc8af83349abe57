"""Fused residual addition and ReLU: the tail of a residual block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from skinfast.ops._library import (
    SampleInput,
    empty_in_layout_of,
    refuse_double_backward,
    register_fake,
    register_promotion,
)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    r"""``relu(x + residual)`` in one pass over memory, forward and backward.

    .. math:: y = \max(x + r, 0), \qquad
              \partial L / \partial x = \partial L / \partial r = [y > 0] \, \partial L / \partial y

    The paper's equation 8. The gradient needs only the output, so neither input is kept.

    Args:
        x: ``[*]``, float32, float64, bfloat16 or (CUDA) float16, any layout.
        residual: of x's shape, dtype and device; no broadcasting.

    Returns:
        ``[*]``, of x's dtype, in x's layout where x is dense (contiguous or channels_last).

    Raises:
        RuntimeError: shape, dtype or device of the two differ, or the dtype is not supported.
    """
    return torch.ops.skinfast.add_relu(x, residual)


def reference(x: Tensor, residual: Tensor) -> Tensor:
    """The same in pure PyTorch."""
    return torch.relu(x + residual)


@register_fake("add_relu")
def _(x: Tensor, residual: Tensor) -> Tensor:
    return empty_in_layout_of(x)


@register_fake("add_relu_backward")
def _(grad_output: Tensor, output: Tensor) -> Tensor:
    return empty_in_layout_of(output)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    (output,) = ctx.saved_tensors
    grad = torch.ops.skinfast.add_relu_backward(grad_output, output)
    return grad, grad


torch.library.register_autograd("skinfast::add_relu", _backward, setup_context=_setup_context)
refuse_double_backward("add_relu_backward")
register_promotion("add_relu", 0, 1)


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """Calls that cover full vectors, tails, a single element and nothing at all."""
    generator = torch.Generator().manual_seed(0)
    for shape in [(2, 3, 8, 8), (1, 5, 7, 3), (3, 130), (1,), (0, 3, 4, 4)]:
        x, residual = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            .to(device, dtype)
            .requires_grad_()
            for _ in range(2)
        )
        yield SampleInput("x".join(map(str, shape)), (x, residual), {})
