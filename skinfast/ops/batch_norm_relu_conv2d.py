"""Fused batch normalisation and ReLU, and the convolution behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skinfast.ops._library import (
    SampleInput,
    conv2d_layout,
    conv2d_output_shape,
    empty_in_layout_of,
    pair,
    refuse_double_backward,
    register_fake,
    register_lower_precision,
    symmetric_padding,
)
from skinfast.ops.batch_norm_relu import (
    check_values_per_channel,
    fake_forward,
    statistics_of,
    update_running_statistics,
)
from skinfast.ops.conv2d import conv2d_gradients

# The convolution's need, and that of the batch norm's sums over a channel; see both.
TOLERANCES = {torch.float32: {"rtol": 2e-5, "atol": 2e-4}}
# The gradients of norm_weight are a few values, of which PyTorch's may by luck all be near the
# exact ones: of eight and of three in bfloat16 they were 2.1 and 3.6 times nearer than ours.
LOW_PRECISION_FACTORS = {torch.bfloat16: 4.0}


def batch_norm_relu_conv2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    statistics: Tensor | None = None,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``conv2d(batch_norm_relu(input), weight)``, whose gradient saves a pass over memory.

    .. math:: y = w * \max\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta, 0\right)

    Where skinfast's tensor-core kernels compute the gradient of the convolution's input, one masks
    it by the ReLU as well and adds up, for each channel, :math:`\sum g` and :math:`\sum g x`, of
    what is masked but not rounded yet, in float32 over 128 rows and in float64 over those. From
    them follow the gradients of :math:`\gamma` and :math:`\beta`, and what the gradient of x needs.
    Everywhere else it is :func:`batch_norm_relu` and :func:`conv2d`, which saves nothing: ask
    ``conv2d_statistics.is_chosen(..., of_gradient=True)``.

    Args:
        input: ``[N, C, H, W]``, float32, float64, bfloat16 or (CUDA) float16.
        running_mean: ``[C]``, or None, which evaluation refuses. Statistics, norm_weight and
            norm_bias are each in input's dtype or, for a 16-bit input, in float32.
        running_var: as running_mean; both or neither.
        norm_weight: :math:`\gamma`, ``[C]``, or None for 1.
        norm_bias: :math:`\beta`, ``[C]``, or None for 0.
        weight: :math:`w`, ``[K, C / groups, R, S]``, of input's dtype and device.
        training: whether to normalise by the batch's statistics, which then move the running
            ones, as in :func:`batch_norm_relu`.
        momentum: the batch's share in the running statistics.
        eps: added to the variance.
        stride, padding, dilation, groups: as for :func:`conv2d`.
        statistics: ``[2, C]``, input's, as for :func:`batch_norm_relu`.
        return_statistics: whether to return the output's as well, as :func:`conv2d_statistics`.

    Returns:
        ``[N, K, P, Q]``, and if wanted its mean and biased variance ``[2, K]``.

    Raises:
        ValueError: in training, where a channel has a single value.
        RuntimeError: a shape, dtype or device does not fit, or the dtype is not supported.
    """
    op = "batch_norm_relu_conv2d"
    stride, dilation = pair(op, stride), pair(op, dilation)
    padding = symmetric_padding(op, padding, weight, stride, dilation)
    if training:
        check_values_per_channel(input)
    geometry = (stride, padding, dilation, groups)
    vectors = (norm_weight, norm_bias, running_mean, running_var)
    output, of_output, _, _, mean, variance = torch.ops.skinfast.batch_norm_relu_conv2d(
        input, weight, *vectors, training, eps, *geometry, return_statistics, statistics
    )
    if training:
        update_running_statistics(input, running_mean, running_var, mean, variance, momentum)
    return (output, of_output) if return_statistics else output


def reference(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    statistics: Tensor | None = None,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in pure PyTorch, which computes the statistics by itself."""
    normalized = F.batch_norm(
        input, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps
    )
    output = F.conv2d(torch.relu(normalized), weight, None, stride, padding, dilation, groups)
    return (output, statistics_of(output)) if return_statistics else output


@register_fake("batch_norm_relu_conv2d")
def _(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    want_statistics: bool,
    statistics: Tensor | None,
) -> tuple[Tensor, ...]:
    normalized, mask, mean, variance = fake_forward(x, relu=True)
    shape = conv2d_output_shape(x, weight, stride, padding, dilation)
    output = x.new_empty(shape).contiguous(memory_format=conv2d_layout(normalized, weight))
    of_output = mean.new_empty((2, weight.shape[0]) if want_statistics else 0)
    return output, of_output, normalized, mask, mean, variance


@register_fake("batch_norm_relu_conv2d_backward")
def _(
    grad_output: Tensor,
    normalized: Tensor,
    weight: Tensor,
    x: Tensor,
    mask: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm_weight: Tensor | None,
    training: bool,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    want_input: bool,
    want_weight: bool,
) -> tuple[Tensor, ...]:
    grad_x = empty_in_layout_of(x) if want_input else x.new_empty(0)
    _, grad_weight, _ = conv2d_gradients(normalized, weight, False, want_weight, False)
    return grad_x, grad_weight, torch.empty_like(mean), torch.empty_like(mean)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, norm_weight, norm_bias, _, _, ctx.training, ctx.eps, *ctx.arguments = inputs
    ctx.arguments = ctx.arguments[:4]
    normalized, mask, mean, variance = output[2:]
    ctx.save_for_backward(normalized, weight, x, mask, mean, variance, norm_weight)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for those five
    ctx.bias_dtype = None if norm_bias is None else norm_bias.dtype


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    needs_x, needs_weight, needs_norm_weight, needs_norm_bias, *_ = ctx.needs_input_grad
    norm_weight = ctx.saved_tensors[-1]
    grad_x, grad_weight, grad_norm_weight, grad_norm_bias = (
        torch.ops.skinfast.batch_norm_relu_conv2d_backward(
            grad_output,
            *ctx.saved_tensors,
            ctx.training,
            ctx.eps,
            *ctx.arguments,
            needs_x,
            needs_weight,
        )
    )
    return (
        grad_x if needs_x else None,
        grad_weight if needs_weight else None,
        grad_norm_weight.to(norm_weight.dtype) if needs_norm_weight else None,
        grad_norm_bias.to(ctx.bias_dtype) if needs_norm_bias else None,
        *(None,) * 10,
    )


torch.library.register_autograd(
    "skinfast::batch_norm_relu_conv2d", _backward, setup_context=_setup_context
)
refuse_double_backward("batch_norm_relu_conv2d_backward")
register_lower_precision("batch_norm_relu_conv2d", 0, 1)


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """What the tensor-core kernels take, PyTorch's own kinds of convolution, absent vectors."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def sample(name: str, x: tuple[int, ...], w: tuple[int, ...], **kwargs: Any) -> SampleInput:
        running = random(x[1]), random(x[1]).square() + 0.5
        parameters = [random(*shape).requires_grad_() for shape in ((x[1],), (x[1],), w)]
        return SampleInput(name, (random(*x).requires_grad_(), *running, *parameters), kwargs)

    # Fewer than 16 channels: PyTorch's convolution on every CPU, and so one rounding in bfloat16.
    yield sample("pointwise", (3, 8, 4, 3), (16, 8, 1, 1), training=True)
    yield sample("pointwise-evaluation", (3, 8, 4, 3), (16, 8, 1, 1))
    yield sample("pointwise-1x1-map", (5, 8, 1, 1), (16, 8, 1, 1), training=True)
    both = {"training": True, "return_statistics": True}
    yield sample("strided-statistics", (2, 8, 5, 4), (24, 8, 3, 3), stride=2, padding=1, **both)
    yield sample("odd-channels", (2, 3, 6, 5), (5, 3, 3, 3), padding="same", training=True)
    yield sample("dilated-grouped", (2, 4, 9, 8), (6, 2, 3, 3), dilation=(2, 1), groups=2)
    yield sample("empty", (0, 8, 4, 4), (8, 8, 1, 1), training=True)
    x, weight = random(4, 6, 5, 5).requires_grad_(), random(8, 6, 1, 1).requires_grad_()
    yield SampleInput("no-vectors", (x, None, None, None, None, weight), {"training": True})
    data, norm_weight = x.detach(), random(6).requires_grad_()
    yield SampleInput("data", (data, None, None, norm_weight, None, weight), {"training": True})
