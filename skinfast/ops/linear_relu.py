"""Fused dense layer and ReLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from skinfast.ops._library import (
    SampleInput,
    refuse_double_backward,
    register_fake,
    register_lower_precision,
)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``relu(linear(input, weight, bias))``; arguments as ``torch.nn.functional.linear``.

    .. math:: y = \max(x W^T + b, 0)

    The dense layers of the paper's CNN (section 4.3). The gradient (its equation 5) is masked in
    the same pass that sums the bias gradient.

    Args:
        input: ``[*, in_features]``, float32, float64, bfloat16 or (CUDA) float16.
        weight: ``[out_features, in_features]``, of input's dtype and device.
        bias: ``[out_features]`` or None.

    Returns:
        ``[*, out_features]``, contiguous.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    return torch.ops.skinfast.linear_relu(input, weight, bias)


def reference(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in pure PyTorch."""
    return torch.relu(torch.nn.functional.linear(input, weight, bias))


@register_fake("linear_relu")
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@register_fake("linear_relu_backward")
def _(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    want_input: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(input.shape if want_input else 0),
        input.new_empty(weight.shape if want_weight else 0),
        input.new_empty(weight.shape[0] if want_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _ = inputs
    ctx.save_for_backward(input, weight, output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grads = torch.ops.skinfast.linear_relu_backward(grad_output, output, input, weight, *wanted)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


torch.library.register_autograd("skinfast::linear_relu", _backward, setup_context=_setup_context)
refuse_double_backward("linear_relu_backward")
register_lower_precision("linear_relu", 0, 1, 2)


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """The CNN's dense layers, more columns than one task covers, several leading dimensions."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    yield SampleInput("cnn", (tensor(8, 40), tensor(120, 40), tensor(120)), {})
    yield SampleInput("no-bias", (tensor(33, 12), tensor(7, 12)), {})
    yield SampleInput("3d", (tensor(2, 5, 6), tensor(65, 6), tensor(65)), {})
    yield SampleInput("one-row", (tensor(4), tensor(3, 4), tensor(3)), {})
    yield SampleInput("empty", (tensor(0, 4), tensor(3, 4), tensor(3)), {})
