"""Convolution that also gives the statistics a batch normalisation behind it needs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from skinfast.ops._library import (
    SampleInput,
    conv2d_layout,
    conv2d_output_shape,
    pair,
    register_fake,
    register_lower_precision,
    symmetric_padding,
)
from skinfast.ops.batch_norm_relu import statistics_of

try:
    from skinfast import _host
except ImportError:  # built without Python.h
    _host = None  # type: ignore[assignment]


def conv2d_statistics(
    input: Tensor,
    weight: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""``conv2d`` without a bias, and the mean and variance of each channel of its output.

    .. math:: \mu_k = \frac{1}{NPQ} \sum_{npq} y_{nkpq}, \qquad
              \sigma^2_k = \frac{1}{NPQ} \sum_{npq} y_{nkpq}^2 - \mu_k^2

    What :func:`batch_norm_relu` and :func:`batch_norm_add_relu` take as ``statistics``, and then
    need one pass over their input less. Where skinfast's tensor-core kernels compute it, the
    statistics are sums over the convolution's results before these are rounded, in float32 over
    128 rows and in float64 over those. Everywhere else it is ``conv2d`` and ``torch.var_mean``,
    which saves nothing: ask :func:`is_chosen`.

    Args:
        input, weight, stride, padding, dilation, groups: as for :func:`conv2d`.

    Returns:
        The output ``[N, K, P, Q]``, and ``[2, K]``, mean and biased variance, in float32 or for a
        float64 input in float64. The latter has no gradient: the batch norm that takes it knows
        how it depends on the output.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    stride, dilation = pair("conv2d_statistics", stride), pair("conv2d_statistics", dilation)
    padding = symmetric_padding("conv2d_statistics", padding, weight, stride, dilation)
    return torch.ops.skinfast.conv2d_statistics(input, weight, stride, padding, dilation, groups)


def reference(
    input: Tensor,
    weight: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """The same in pure PyTorch."""
    output = torch.nn.functional.conv2d(input, weight, None, stride, padding, dilation, groups)
    return output, statistics_of(output)


# --- where it is faster ---------------------------------------------------------------------------


def has_persistent_kernels(device: int | None = None) -> bool:
    """Whether this build and this GPU have the kernels for sm_90a."""
    built = _host is not None and "sm_90a" in _host.build_info()["cutlass"]
    return built and torch.cuda.get_device_capability(device) == (9, 0)


def is_chosen(
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    *,
    of_gradient: bool = False,
) -> bool:
    """Whether a kernel of skinfast gives the statistics on input's device.

    That is so where csrc/conv2d/conv2d_choices.h, measured on that device, says that it is faster,
    or ``SKINFAST_CONV2D`` names the kernel. Nothing is computed; the answer hangs on shapes alone.
    With ``of_gradient`` the question is of the sums over input's gradient, which the batch norm
    before the convolution needs: see :func:`batch_norm_relu_conv2d`.
    """
    if not input.is_cuda or torch.compiler.is_compiling():
        return False
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else input.dtype
    n, k, p, q = conv2d_output_shape(input, weight, [*stride], [*padding], [*dilation])
    in_rows = conv2d_layout(input, weight) == torch.channels_last or p * q == 1
    if dtype != torch.bfloat16 or groups != 1 or dilation != (1, 1) or not in_rows:
        return False
    sizes = (n, *input.shape[1:], k, *weight.shape[2:], p, q, *stride, *padding)
    wish = os.environ.get("SKINFAST_CONV2D", "")
    return _is_chosen(wish, input.device.index, sizes, of_gradient)


@functools.cache
def _is_chosen(wish: str, device: int | None, sizes: tuple[int, ...], of_gradient: bool) -> bool:
    return has_persistent_kernels(device) and _host.chooses_conv2d_statistics(
        wish, torch.cuda.get_device_name(device), sizes, of_gradient
    )


# --- registration ---------------------------------------------------------------------------------


@register_fake("conv2d_statistics")
def _(
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    shape = conv2d_output_shape(input, weight, stride, padding, dilation)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    output = input.new_empty(shape).contiguous(memory_format=conv2d_layout(input, weight))
    return output, input.new_empty((2, weight.shape[0]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, *ctx.arguments = inputs
    ctx.save_for_backward(input, weight)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_output is None:
        return (None,) * 6
    wanted = ctx.needs_input_grad[:2]
    grads = torch.ops.skinfast.conv2d_backward(
        grad_output, *ctx.saved_tensors, *ctx.arguments, *wanted, False
    )
    needed = [grad if want else None for grad, want in zip(grads, wanted, strict=False)]
    return *needed, None, None, None, None


torch.library.register_autograd(
    "skinfast::conv2d_statistics", _backward, setup_context=_setup_context
)
register_lower_precision("conv2d_statistics", 0, 1)

# As for conv2d. The gradient that comes in is that of the output alone.
TOLERANCES = {torch.float32: {"rtol": 5e-6, "atol": 4e-5}}


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """What the tensor-core kernels take, and PyTorch's own kinds of convolution."""
    generator = torch.Generator().manual_seed(0)

    def sample(name: str, x: tuple[int, ...], w: tuple[int, ...], **kwargs: Any) -> SampleInput:
        tensors = [
            torch.randn(shape, generator=generator, dtype=torch.float64)
            .to(device, dtype)
            .requires_grad_()
            for shape in (x, w)
        ]
        return SampleInput(name, tuple(tensors), kwargs)

    yield sample("pointwise", (3, 24, 4, 3), (32, 24, 1, 1))
    yield sample("pointwise-1x1-map", (5, 24, 1, 1), (16, 24, 1, 1))
    yield sample("strided", (2, 16, 5, 4), (24, 16, 3, 3), stride=2, padding=1)
    yield sample("odd-channels", (2, 3, 6, 5), (5, 3, 3, 3), padding="same")
    yield sample("dilated-grouped", (2, 4, 9, 8), (6, 2, 3, 3), dilation=(2, 1), groups=2)
