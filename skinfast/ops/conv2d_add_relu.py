"""Fused convolution, bias, residual addition and ReLU: the end of a folded residual block."""

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


def conv2d_add_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""``relu(conv2d(input, weight, bias) + residual)``.

    .. math:: y_{nkpq} = \max\Big(b_k + \sum_{crs} w_{kcrs} \, x_{n,c,p\sigma+r-\pi,q\sigma+s-\pi}
              + r_{nkpq}, \; 0\Big)

    (stride :math:`\sigma`, padding :math:`\pi`). The paper's equation 8 with the batch
    normalisation folded into weights and bias, as ``skinfast.models.fold_batch_norm`` does it. It
    is ``conv2d`` followed by ``add_relu``; on a GPU, convolutions that the table of choices
    (csrc/conv2d/conv2d_choices.h) gives to skinfast's tensor-core kernels do both in one pass.
    Under autocast the residual is brought to the convolution's dtype, and so is the result.

    Args:
        input: ``[N, C, H, W]``, float32, float64, bfloat16 or (CUDA) float16.
        weight: ``[K, C / groups, R, S]``, of input's dtype and device.
        bias: ``[K]`` or None.
        residual: ``[N, K, P, Q]``, of input's dtype and device; no broadcasting.
        stride, padding, dilation: one number or (vertical, horizontal); padding also "valid", or
            "same" where the padding is equal on both sides.
        groups: divides C and K.

    Returns:
        ``[N, K, P, Q]``; channels_last where input or weight is, as PyTorch's convolution.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    stride, dilation = pair("conv2d_add_relu", stride), pair("conv2d_add_relu", dilation)
    padding = symmetric_padding("conv2d_add_relu", padding, weight, stride, dilation)
    return torch.ops.skinfast.conv2d_add_relu(
        input, weight, bias, residual, stride, padding, dilation, groups
    )


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """The same in pure PyTorch."""
    sum = torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return torch.relu(sum + residual.to(sum.dtype))


@register_fake("conv2d_add_relu")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    shape = conv2d_output_shape(input, weight, stride, padding, dilation)
    return input.new_empty(shape).contiguous(memory_format=conv2d_layout(input, weight))


@register_fake("conv2d_add_relu_backward")
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = conv2d_gradients(input, weight, want_input, want_weight, want_bias)
    return *gradients, torch.empty_like(output)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, _, *ctx.arguments = inputs
    ctx.save_for_backward(input, weight, output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, weight, output = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:4]
    grads = torch.ops.skinfast.conv2d_add_relu_backward(
        grad_output, output, input, weight, *ctx.arguments, *wanted[:3]
    )
    needed = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return *needed, None, None, None, None


torch.library.register_autograd(
    "skinfast::conv2d_add_relu", _backward, setup_context=_setup_context
)
refuse_double_backward("conv2d_add_relu_backward")
register_lower_precision("conv2d_add_relu", 0, 1, 2, 3)


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """The ends of ResNet-50's blocks, and PyTorch's own kinds of convolution."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    def sample(
        name: str, x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, int], **kwargs: Any
    ) -> SampleInput:
        bias = tensor(w[0]) if kwargs.pop("with_bias", True) else None
        return SampleInput(name, (tensor(*x), tensor(*w), bias, tensor(x[0], w[0], *y)), kwargs)

    yield sample("pointwise", (3, 24, 4, 3), (32, 24, 1, 1), (4, 3))
    yield sample("pointwise-1x1-map", (5, 24, 1, 1), (16, 24, 1, 1), (1, 1), with_bias=False)
    yield sample("strided", (2, 16, 5, 4), (24, 16, 3, 3), (3, 2), stride=2, padding=1)
    yield sample("odd-channels", (2, 3, 6, 5), (5, 3, 3, 3), (6, 5), padding="same")
    yield sample("dilated-grouped", (2, 4, 9, 8), (6, 2, 3, 3), (5, 6), dilation=(2, 1), groups=2)
    yield sample("empty", (0, 16, 4, 4), (8, 16, 1, 1), (4, 4))
