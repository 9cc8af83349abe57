"""Fused convolution, bias and ReLU."""

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


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""``relu(conv2d(input, weight, bias))``; arguments as ``torch.nn.functional.conv2d``.

    .. math:: y_{nkpq} = \max\Big(b_k + \sum_{crs} w_{kcrs} \, x_{n,c,p+r-\pi,q+s-\pi}, \; 0\Big)

    (stride 1, padding :math:`\pi`). Section 4.3 of the paper; the gradient (its equation 5) passes
    where ``y > 0`` and is masked in the same pass that sums the bias gradient.

    Convolutions of at most 16 channels in and out, kernels up to 7x7, stride 1, dilation 1 and one
    group run on kernels of skinfast; all others on PyTorch's convolution. On the CPU the kernels
    work on contiguous tensors: others are copied, and the output is stored as the input.

    Args:
        input: ``[N, C, H, W]``, float32, float64, bfloat16 or (CUDA) float16.
        weight: ``[K, C / groups, R, S]``, of input's dtype and device.
        bias: ``[K]`` or None.
        stride, padding, dilation: one number or (vertical, horizontal); padding also "valid", or
            "same" where the padding is equal on both sides.
        groups: divides C and K.

    Returns:
        ``[N, K, P, Q]``; channels_last where input or weight is, as PyTorch's convolution.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    stride, dilation = pair("conv2d_relu", stride), pair("conv2d_relu", dilation)
    padding = symmetric_padding("conv2d_relu", padding, weight, stride, dilation)
    return torch.ops.skinfast.conv2d_relu(input, weight, bias, stride, padding, dilation, groups)


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """The same in pure PyTorch."""
    return torch.relu(
        torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    )


# --- fake kernels: the layouts that the real ones return ------------------------------------------


@register_fake("conv2d_relu")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    shape = conv2d_output_shape(input, weight, stride, padding, dilation)
    return input.new_empty(shape).contiguous(memory_format=conv2d_layout(input, weight))


@register_fake("conv2d_relu_backward")
def _(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    want_input: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return conv2d_gradients(input, weight, want_input, want_weight, want_bias)


# --- autograd and autocast ------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *ctx.arguments = inputs
    ctx.save_for_backward(input, weight, output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, weight, output = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    grads = torch.ops.skinfast.conv2d_relu_backward(
        grad_output, output, input, weight, *ctx.arguments, *wanted
    )
    needed = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return *needed, None, None, None, None


torch.library.register_autograd("skinfast::conv2d_relu", _backward, setup_context=_setup_context)
refuse_double_backward("conv2d_relu_backward")
register_lower_precision("conv2d_relu", 0, 1, 2)


# Measured on the samples: gradients of weights by PyTorch in float32 are up to 4.8e-5 from float64,
# ours up to 1.0e-5 on either backend.
TOLERANCES = {torch.float32: {"rtol": 5e-6, "atol": 6e-5}}


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """The CNN's three layers, full and partial vectors of images, and the general path."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    def sample(name: str, x: tuple[int, ...], w: tuple[int, ...], **kwargs: Any) -> SampleInput:
        bias = tensor(w[0]) if kwargs.pop("with_bias", True) else None
        return SampleInput(name, (tensor(*x), tensor(*w), bias), kwargs)

    yield sample("cnn1", (33, 3, 8, 8), (10, 3, 3, 3), padding="same")
    yield sample("cnn2", (16, 10, 7, 5), (10, 10, 5, 5), padding="same")
    yield sample("cnn3", (3, 10, 10, 10), (10, 10, 7, 7), padding=3)
    yield sample("16-to-13", (5, 16, 4, 20), (13, 16, 2, 3), padding=(0, 2), with_bias=False)
    yield sample("map-smaller-than-kernel", (2, 1, 2, 1), (1, 1, 5, 3), padding=(4, 1))
    yield sample("tall", (2, 2, 35, 3), (4, 2, 3, 3), padding=1)
    yield sample("strided", (2, 3, 9, 9), (8, 3, 3, 3), stride=2, padding=1)
    yield sample("dilated-grouped", (2, 4, 9, 8), (6, 2, 3, 3), dilation=(2, 1), groups=2)
    yield sample("wide", (2, 32, 5, 5), (24, 32, 1, 1), with_bias=False)
    yield sample("empty", (0, 3, 8, 8), (10, 3, 3, 3), padding=1)
