"""Convolution, fast where maps are small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from skinfast.ops._library import (
    SampleInput,
    conv2d_layout,
    conv2d_output_shape,
    layout_of,
    pair,
    refuse_double_backward,
    register_fake,
    register_lower_precision,
    symmetric_padding,
)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""``torch.nn.functional.conv2d``, with its arguments.

    .. math:: y_{nkpq} = b_k + \sum_{crs} w_{kcrs} \, x_{n,c,p\sigma+r-\pi,q\sigma+s-\pi}

    (stride :math:`\sigma`, padding :math:`\pi`). On the CPU, channels_last convolutions with 1x1
    kernels or on small maps (ResNet-50's late stages at 64x64 and 32x32) are computed as matrix
    products of the patches and the weights as they are stored, forward and backward, and so are
    gradients of the weight, and of the input behind a stride, on CPUs where PyTorch's are slow;
    taps that only meet padding are left out. In float32 a CPU with bfloat16 tiles (Intel AMX)
    multiplies the three bfloat16 that a number is the sum of, with float32's accuracy; an infinity
    becomes NaN there. All others, and all on CUDA, are PyTorch's convolution.

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
    stride, dilation = pair("conv2d", stride), pair("conv2d", dilation)
    padding = symmetric_padding("conv2d", padding, weight, stride, dilation)
    return torch.ops.skinfast.conv2d(input, weight, bias, stride, padding, dilation, groups)


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
    return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)


@register_fake("conv2d")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return input.new_empty(
        conv2d_output_shape(input, weight, stride, padding, dilation)
    ).contiguous(memory_format=conv2d_layout(input, weight))


@register_fake("conv2d_backward")
def _(
    grad_output: Tensor,
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


def conv2d_gradients(
    input: Tensor, weight: Tensor, want_input: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of a convolution in their layouts; an empty vector for an unwanted one."""
    nothing = input.new_empty(0)
    layout = conv2d_layout(input, weight)
    return (
        torch.empty_like(input, memory_format=layout) if want_input else nothing,
        torch.empty_like(weight, memory_format=layout_of(weight)) if want_weight else nothing,
        input.new_empty(weight.shape[0]) if want_bias else nothing,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *ctx.arguments = inputs
    ctx.save_for_backward(input, weight)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    grads = torch.ops.skinfast.conv2d_backward(grad_output, input, weight, *ctx.arguments, *wanted)
    needed = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return *needed, None, None, None, None


torch.library.register_autograd("skinfast::conv2d", _backward, setup_context=_setup_context)
refuse_double_backward("conv2d_backward")
register_lower_precision("conv2d", 0, 1, 2)

# Measured on the samples: PyTorch's float32 is up to 3.4 times assert_close's default from float64,
# ours up to 3.3 times.
TOLERANCES = {torch.float32: {"rtol": 5e-6, "atol": 4e-5}}


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """ResNet-50's kinds of convolution on small maps, and PyTorch's own path."""
    generator = torch.Generator().manual_seed(0)

    def sample(name: str, x: tuple[int, ...], w: tuple[int, ...], **kwargs: Any) -> SampleInput:
        tensors = [
            torch.randn(shape, generator=generator, dtype=torch.float64)
            .to(device, dtype)
            .requires_grad_()
            for shape in (x, w)
        ]
        return SampleInput(name, tuple(tensors), kwargs)

    yield sample("pointwise", (3, 20, 4, 3), (24, 20, 1, 1))
    yield sample("pointwise-strided", (3, 20, 5, 4), (24, 20, 1, 1), stride=2)
    yield sample("centre-tap", (5, 16, 1, 1), (18, 16, 3, 3), padding=1)
    yield sample("four-taps", (5, 16, 2, 2), (18, 16, 3, 3), stride=2, padding=1)
    yield sample("2x2", (4, 300, 2, 2), (8, 300, 3, 3), padding=1)
    yield sample("4x4-to-2x2", (3, 17, 4, 4), (16, 17, 3, 3), stride=2, padding=1)
    yield sample("uneven", (2, 16, 3, 4), (5, 16, 2, 3), padding=(0, 1), stride=(1, 2))
    # Channels in panels of 32; and rows, of one pixel's images where taps can be left out.
    yield sample("panels", (3, 32, 5, 4), (64, 32, 3, 3), padding=1)
    yield sample("panels-strided", (5, 64, 5, 4), (32, 64, 3, 3), stride=2, padding=1)
    yield sample("panels-pointwise", (7, 64, 3, 3), (96, 64, 1, 1))
    yield sample("panels-between-strides", (3, 32, 5, 5), (32, 32, 1, 1), stride=2)
    yield sample("panels-first-pixel", (40, 32, 2, 2), (32, 32, 1, 1), stride=2)
    yield sample("panels-centre-tap", (40, 32, 1, 1), (32, 32, 3, 3), padding=1)
    yield sample("panels-of-a-pixel", (64, 32, 4, 3), (32, 32, 3, 3), padding=1)
    yield sample("panels-of-two-pixels", (40, 32, 3, 3), (32, 32, 3, 3), padding=1)
    yield sample("panels-of-a-pixel-strided", (32, 32, 6, 4), (32, 32, 3, 3), stride=2, padding=1)
    yield sample("panels-in-parts", (32, 96, 2, 2), (32, 96, 3, 3), padding=1)
    # Minimal filtering: even maps, 64 tiles or more, panels of rows that are full or are not.
    yield sample("tiles", (16, 32, 4, 4), (64, 32, 3, 3), padding=1)
    yield sample("tiles-of-several-maps", (5, 64, 10, 6), (32, 64, 3, 3), padding=1)
    yield sample("tiles-in-parts", (37, 32, 4, 4), (32, 32, 3, 3), padding=1)
    yield sample("stem", (2, 3, 12, 12), (8, 3, 7, 7), stride=2, padding=3)
    yield sample("grouped", (2, 32, 3, 3), (6, 16, 3, 3), groups=2, dilation=2, padding=2)
    yield sample("empty", (0, 16, 4, 4), (8, 16, 1, 1))
