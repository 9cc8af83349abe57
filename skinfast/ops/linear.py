"""A dense layer."""

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


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``torch.nn.functional.linear`` that is quick where the matrices are small.

    .. math:: y = x W^T + b

    On a CPU the three products of a classifier's last layer take less time than PyTorch's calls of
    a matrix library. Large ones and those on a GPU are PyTorch's.

    Args:
        input: ``[*, in_features]``, float32, float64, bfloat16 or (CUDA) float16.
        weight: ``[out_features, in_features]``, of input's dtype and device.
        bias: ``[out_features]`` or None.

    Returns:
        ``[*, out_features]``, contiguous.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    return torch.ops.skinfast.linear(input, weight, bias)


def reference(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in pure PyTorch."""
    return torch.nn.functional.linear(input, weight, bias)


@register_fake("linear")
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@register_fake("linear_backward")
def _(
    grad_output: Tensor,
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
    ctx.save_for_backward(input, weight)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    grads = torch.ops.skinfast.linear_backward(grad_output, *ctx.saved_tensors, *wanted)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


torch.library.register_autograd("skinfast::linear", _backward, setup_context=_setup_context)
refuse_double_backward("linear_backward")
register_lower_precision("linear", 0, 1, 2)


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """The CNN's dense layers, sizes beside every vector's, several leading dimensions."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    yield SampleInput("cnn", (tensor(8, 40), tensor(120, 40), tensor(120)), {})
    yield SampleInput("classifier", (tensor(12, 64), tensor(7, 64), tensor(7)), {})
    yield SampleInput("no-bias", (tensor(33, 12), tensor(37, 12)), {})
    yield SampleInput("3d", (tensor(2, 5, 6), tensor(65, 6), tensor(65)), {})
    yield SampleInput("one-row", (tensor(4), tensor(3, 4), tensor(3)), {})
    yield SampleInput("empty", (tensor(0, 4), tensor(3, 4), tensor(3)), {})
