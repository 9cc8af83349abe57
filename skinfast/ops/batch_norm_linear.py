"""Fused batch normalisation and dense layer, for input that is data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skinfast.ops._library import SampleInput, refuse_double_backward, register_fake
from skinfast.ops.batch_norm_relu import (
    batch_norm_relu,
    check_values_per_channel,
    update_running_statistics,
)

# As many outputs as the kernels are made for; the twin of kMaxOutputs in batch_norm_linear.h.
MAX_OUTPUTS = 16

# The gradients are sums over rows of products that cancel. On the samples PyTorch's own are up to
# 6.7e-5 from float64, ours up to 8.6e-5, where they reach 10.
TOLERANCES = {torch.float32: {"rtol": 8e-6, "atol": 8e-5}}


def batch_norm_linear(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    r"""``linear(batch_norm(input), weight, bias)``: one pass over input forward, one back.

    .. math:: y = \left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta\right) W^T + b

    The paper's logistic regression (section 4.4). The normalised input is never stored: its scale
    moves into :math:`W`. For input that requires a gradient, and for more than 16 outputs,
    :func:`batch_norm_relu` and ``torch.nn.functional.linear`` are called instead.

    Pixels may come as the bytes that they are, uint8, together with what normalises them. The
    result, the gradients and the running statistics are those of ``scale * input + shift``, which
    is never stored either: a quarter of the memory is read, and the batch's statistics are sums of
    integers, exact.

    Args:
        input: ``[N, F]``, float32, float64, bfloat16, (CUDA) float16 or uint8; not contiguous, it
            is copied first.
        running_mean: ``[F]``, or None, which evaluation refuses. Statistics and parameters are
            each in input's dtype or, for a 16-bit input, in float32; for uint8 in float32.
        running_var: as running_mean; both or neither.
        norm_weight: :math:`\gamma`, ``[F]``, or None for 1.
        norm_bias: :math:`\beta`, ``[F]``, or None for 0.
        weight: :math:`W`, ``[K, F]``.
        bias: :math:`b`, ``[K]``, of weight's dtype, or None for 0.
        training: whether to normalise by the batch's statistics, which then move the running
            ones, as in :func:`batch_norm_relu`.
        momentum: the batch's share in the running statistics.
        eps: added to the variance.
        scale, shift: for uint8 input and no other, float32 ``[C]``, where C divides F: of the first
            F / C features, of the next, and so on. ``scale`` must not be 0, or the result is NaN.

    Returns:
        ``[N, K]``, of input's dtype, float32 for uint8. Under autocast, of autocast's dtype,
        rounded to it once.

    Raises:
        ValueError: in training, where a feature has a single value.
        RuntimeError: a shape, dtype or device does not fit, or the dtype is not supported.
    """
    if input.requires_grad or not 1 <= weight.size(0) <= MAX_OUTPUTS:
        input = _normalized_pixels(input, scale, shift)
        normalized = batch_norm_relu(
            input, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps, False
        )
        return F.linear(normalized, weight, bias)
    if training:
        check_values_per_channel(input)
    output, mean, variance = torch.ops.skinfast.batch_norm_linear(
        input,
        weight,
        bias,
        norm_weight,
        norm_bias,
        running_mean,
        running_var,
        training,
        eps,
        scale,
        shift,
    )
    if training:
        update_running_statistics(input, running_mean, running_var, mean, variance, momentum)
    device = input.device.type
    if torch.is_autocast_enabled(device) and output.dtype != torch.float64:
        output = output.to(torch.get_autocast_dtype(device))
    return output


def reference(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The same in pure PyTorch."""
    input = _normalized_pixels(input, scale, shift)
    normalized = F.batch_norm(
        input, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps
    )
    return F.linear(normalized, weight, bias)


def _normalized_pixels(input: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """What bytes stand for; other input is returned as it is."""
    if input.dtype != torch.uint8 or scale is None or shift is None:
        return input
    planes = input.unflatten(1, (scale.numel(), -1)) * scale[:, None] + shift[:, None]
    return planes.flatten(1)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@register_fake("batch_norm_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance = (x.new_empty(x.size(1), dtype=_statistics_dtype(x)) for _ in range(2))
    dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    return x.new_empty(x.size(0), weight.size(0), dtype=dtype), mean, variance


@register_fake("batch_norm_linear_backward")
def _(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        mean.new_empty(weight.shape),
        mean.new_empty(weight.size(0)),
        torch.empty_like(mean),
        torch.empty_like(mean),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, norm_weight, norm_bias, *_, eps, scale, shift = inputs
    _, mean, variance = output
    ctx.save_for_backward(x, mean, variance, weight, norm_weight, norm_bias, scale, shift)
    ctx.mark_non_differentiable(mean, variance)
    ctx.set_materialize_grads(False)  # no zeros for those two
    ctx.eps = eps
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    needs_x, needs_weight, needs_bias, needs_norm_weight, needs_norm_bias, *_ = ctx.needs_input_grad
    if needs_x:
        raise RuntimeError(
            "batch_norm_linear has no gradient of x; skinfast.ops.batch_norm_linear has"
        )
    x, mean, variance, weight, norm_weight, norm_bias, scale, shift = ctx.saved_tensors
    grad_weight, grad_bias, grad_norm_weight, grad_norm_bias = (
        torch.ops.skinfast.batch_norm_linear_backward(
            grad_output, x, mean, variance, weight, norm_weight, norm_bias, ctx.eps, scale, shift
        )
    )
    return (
        None,
        grad_weight.to(weight.dtype) if needs_weight else None,
        grad_bias.to(ctx.bias_dtype) if needs_bias else None,
        grad_norm_weight.to(norm_weight.dtype) if needs_norm_weight else None,
        grad_norm_bias.to(norm_bias.dtype) if needs_norm_bias else None,
        *(None,) * 6,
    )


torch.library.register_autograd(
    "skinfast::batch_norm_linear", _backward, setup_context=_setup_context
)
refuse_double_backward("batch_norm_linear_backward")


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """Calls that cover both statistics, all ends of blocks and of groups of outputs, no vectors."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    # N, F, K
    for rows, features, outputs in [(6, 10, 3), (9, 301, 7), (70, 64, 16), (150, 40, 9), (0, 6, 2)]:
        for training in (True, False):
            statistics = (random(features), random(features).square() + 0.5)
            shapes = ((features,), (features,), (outputs, features), (outputs,))
            parameters = (random(*shape).requires_grad_() for shape in shapes)
            name = f"{rows}x{features}x{outputs}" + ("_training" if training else "_evaluation")
            args = (random(rows, features), *statistics, *parameters, training)
            yield SampleInput(name, args, {})
    weight = random(5, 12).requires_grad_()
    arguments = {"training": True, "eps": 1e-3}
    yield SampleInput("no_vectors", (random(8, 12), None, None, None, None, weight), arguments)
    yield from _samples_of_bytes(device, dtype, random)
    weight = random(17, 12).requires_grad_()
    yield SampleInput("composed", (random(8, 12), None, None, None, None, weight), arguments)


def _samples_of_bytes(
    device: str, dtype: torch.dtype, random: Callable[..., Tensor]
) -> Iterator[SampleInput]:
    """Pixels, in one channel and in several; all else is float32 then."""
    if dtype != torch.float32:
        return
    # N, F, K, C; the last is composed
    cases = [(6, 12, 3, 3), (70, 303, 7, 3), (9, 600, 16, 2), (150, 40, 9, 1), (0, 6, 2, 3)]
    for rows, features, outputs, channels in [*cases, (8, 12, 17, 3)]:
        for training in (True, False):
            # As of photographs: a skin colour, less of it here and there.
            pixels = (random(rows, features) * 40 + 180).clamp(0, 255).to(torch.uint8)
            statistics = (random(features), random(features).square() + 0.5)
            shapes = ((features,), (features,), (outputs, features), (outputs,))
            parameters = (random(*shape).requires_grad_() for shape in shapes)
            of_channels = torch.arange(channels, device=device, dtype=dtype)
            scale = {"scale": 0.02 + 0.004 * of_channels, "shift": of_channels - 3.7}
            name = f"bytes_{rows}x{features}x{outputs}" + ("_training" if training else "")
            yield SampleInput(name, (pixels, *statistics, *parameters, training), scale)
