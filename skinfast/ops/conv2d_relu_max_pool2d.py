"""Convolution, bias, ReLU and max-pooling as one op: a layer of the paper's CNN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from skinfast.ops._library import (
    SampleInput,
    conv2d_layout,
    conv2d_output_shape,
    pair,
    refuse_double_backward,
    register_fake,
    register_lower_precision,
    symmetric_padding,
)
from skinfast.ops.conv2d import conv2d_gradients


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | tuple[int, int] | str = 0,
    pool_size: int | tuple[int, int] = 2,
) -> Tensor:
    r"""``max_pool2d(relu(conv2d(input, weight, bias, padding=padding)), pool_size)``.

    .. math:: y_{nkij} = \max_{u, v} \; \max\Big(b_k + \sum_{crs} w_{kcrs} \,
        x_{n, \; c, \; h i + u + r - \pi, \; w j + v + s - \pi}, \; 0\Big)

    (windows of h x w pixels side by side; padding :math:`\pi`). Section 4.3 of the paper.

    The convolution's output is never stored: the gradient needs the pooled one and a byte for each
    of its elements, the maximum's position. It is computed pixel by pixel that the ReLU and its
    window let through: behind windows of 2x2, for a quarter of the multiplications at most. A
    masked pixel contributes nothing, also where the input is infinite. Equal maxima and NaN as in
    :func:`skinfast.ops.max_pool2d`; which convolutions run on kernels of skinfast as in
    :func:`skinfast.ops.conv2d_relu`. On CUDA, and for all others, it is composed of these two.

    Args:
        input: ``[N, C, H, W]``, float32, float64, bfloat16 or (CUDA) float16.
        weight: ``[K, C, R, S]``, of input's dtype and device.
        bias: ``[K]`` or None.
        padding: one number or (vertical, horizontal), "valid", or "same" for an odd kernel.
        pool_size: the window's height and width, and from one to the next; at most 255 pixels.
            Rows and columns that fill no window are left out.

    Returns:
        ``[N, K, P // h, Q // w]`` for a convolution with output ``[N, K, P, Q]``; channels_last
        where input or weight is.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    op = "conv2d_relu_max_pool2d"
    padding = symmetric_padding(op, padding, weight, (1, 1), (1, 1))
    output, _ = torch.ops.skinfast.conv2d_relu_max_pool2d(
        input, weight, bias, padding, pair(op, pool_size)
    )
    return output


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | tuple[int, int] | str = 0,
    pool_size: int | tuple[int, int] = 2,
) -> Tensor:
    """The same in pure PyTorch."""
    convolved = torch.nn.functional.conv2d(input, weight, bias, padding=padding)
    return torch.nn.functional.max_pool2d(torch.relu(convolved), pool_size)


@register_fake("conv2d_relu_max_pool2d")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    pool_size: list[int],
) -> tuple[Tensor, Tensor]:
    n, k, p, q = conv2d_output_shape(input, weight, [1, 1], padding, [1, 1])
    output = input.new_empty((n, k, p // pool_size[0], q // pool_size[1]))
    output = output.contiguous(memory_format=conv2d_layout(input, weight))
    return output, torch.empty_like(output, dtype=torch.uint8)


@register_fake("conv2d_relu_max_pool2d_backward")
def _(
    grad_output: Tensor,
    output: Tensor,
    argmax: Tensor,
    input: Tensor,
    weight: Tensor,
    padding: list[int],
    pool_size: list[int],
    want_input: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return conv2d_gradients(input, weight, want_input, want_weight, want_bias)


# --- autograd and autocast ------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, _, *ctx.arguments = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else torch fills a gradient for argmax with zeros
    ctx.save_for_backward(*output, input, weight)


def _backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_output is None:
        return (None,) * 5
    wanted = ctx.needs_input_grad[:3]
    grads = torch.ops.skinfast.conv2d_relu_max_pool2d_backward(
        grad_output, *ctx.saved_tensors, *ctx.arguments, *wanted
    )
    needed = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return *needed, None, None


torch.library.register_autograd(
    "skinfast::conv2d_relu_max_pool2d", _backward, setup_context=_setup_context
)
refuse_double_backward("conv2d_relu_max_pool2d_backward")
register_lower_precision("conv2d_relu_max_pool2d", 0, 1, 2)


# As in conv2d_relu.
TOLERANCES = {torch.float32: {"rtol": 5e-6, "atol": 2e-5}}


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """The CNN's three layers, windows that leave pixels out, partial vectors, the general path."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    def sample(name: str, x: tuple[int, ...], w: tuple[int, ...], **kwargs: Any) -> SampleInput:
        bias = tensor(w[0]) if kwargs.pop("with_bias", True) else None
        return SampleInput(name, (tensor(*x), tensor(*w), bias), kwargs)

    yield sample("cnn1", (33, 3, 8, 8), (10, 3, 3, 3), padding="same", pool_size=2)
    yield sample("cnn2", (16, 10, 8, 8), (10, 10, 5, 5), padding="same", pool_size=3)
    yield sample("cnn3", (3, 10, 10, 10), (10, 10, 7, 7), padding=3, pool_size=4)
    yield sample("16-to-13", (5, 16, 4, 20), (13, 16, 2, 3), padding=(0, 2), with_bias=False)
    yield sample("one-window", (2, 1, 2, 5), (1, 1, 5, 3), padding=(4, 1), pool_size=(6, 5))
    yield sample("tall", (6, 2, 35, 3), (4, 2, 3, 3), padding=1, pool_size=(3, 1))
    yield sample("windows-of-one", (2, 3, 5, 6), (4, 3, 3, 3), pool_size=1)
    yield sample("wide", (2, 32, 5, 5), (24, 32, 1, 1), pool_size=(1, 2))
    yield sample("empty", (0, 3, 8, 8), (10, 3, 3, 3), padding=1)
