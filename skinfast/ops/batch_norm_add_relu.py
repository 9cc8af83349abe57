"""Fused batch normalisation, residual addition and ReLU: the tail of a ResNet block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skinfast.ops._library import (
    SampleInput,
    empty_in_layout_of,
    refuse_double_backward,
    register_fake,
    register_promotion,
)
from skinfast.ops.batch_norm_relu import (
    check_values_per_channel,
    fake_forward,
    save_for_backward,
    update_running_statistics,
)

# The gradients of weight and bias are sums over a channel. Over the 4,320 elements of the largest
# sample PyTorch's own are 10 times assert_close's default from float64 (ours: 1.6 times).
TOLERANCES = {torch.float32: {"rtol": 2e-5, "atol": 2e-4}}


def batch_norm_add_relu(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    statistics: Tensor | None = None,
) -> Tensor:
    r"""``relu(batch_norm(input) + residual)``, with the passes of :func:`batch_norm_relu`.

    .. math:: y = \max\left(
              \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta + r, 0\right), \qquad
              \frac{\partial L}{\partial r} = [y > 0] \frac{\partial L}{\partial y}

    The paper's equation 8, the last layer's batch normalisation included.

    Args:
        input: ``[N, C, *]``, float32, float64, bfloat16 or (CUDA) float16; contiguous and, for
            ``[N, C, H, W]``, channels_last are computed as stored.
        residual: of input's shape, dtype and device; no broadcasting.
        running_mean, running_var, weight, bias, training, momentum, eps, statistics: as for
            :func:`batch_norm_relu`.

    Returns:
        ``[N, C, *]``, of input's dtype and layout. Under autocast, of the wider of the dtypes of
        input and residual.

    Raises:
        ValueError: in training, where a channel has a single value.
        RuntimeError: a shape, dtype or device does not fit, or the dtype is not supported.
    """
    if training:
        check_values_per_channel(input)
    output, _, mean, variance = torch.ops.skinfast.batch_norm_add_relu(
        input, residual, weight, bias, running_mean, running_var, training, eps, statistics
    )
    if training:
        update_running_statistics(input, running_mean, running_var, mean, variance, momentum)
    return output


def reference(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    statistics: Tensor | None = None,
) -> Tensor:
    """The same in pure PyTorch, which computes the statistics by itself."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return torch.relu(output + residual)


@register_fake("batch_norm_add_relu")
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_forward(x, relu=True)


@register_fake("batch_norm_add_relu_backward")
def _(
    grad_output: Tensor,
    x: Tensor,
    mask: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    training: bool,
    eps: float,
    other_grad_output: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_in_layout_of(x),
        empty_in_layout_of(x),
        torch.empty_like(mean),
        torch.empty_like(mean),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, _, weight, bias, _, _, training, eps, _ = inputs
    save_for_backward(ctx, x, weight, bias, training, eps, output)


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    x, mask, mean, variance, weight = ctx.saved_tensors
    grad_x, grad_residual, grad_weight, grad_bias = torch.ops.skinfast.batch_norm_add_relu_backward(
        grad_output, x, mask, mean, variance, weight, ctx.training, ctx.eps
    )
    return (
        grad_x,
        grad_residual,
        grad_weight.to(weight.dtype) if needs_weight else None,
        grad_bias.to(ctx.bias_dtype) if needs_bias else None,
        *(None,) * 5,
    )


torch.library.register_autograd(
    "skinfast::batch_norm_add_relu", _backward, setup_context=_setup_context
)
refuse_double_backward("batch_norm_add_relu_backward")
register_promotion("batch_norm_add_relu", 0, 1)


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """Calls that cover both statistics, both ends of the tiling and absent vectors."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    shapes: list[tuple[int, ...]] = [
        (4, 10, 3, 3),
        (3, 24, 2, 2),
        (2, 3, 26, 21),
        (3, 8, 40, 36),
        (150, 8, 1, 1),
    ]
    shapes += [(40, 6, 2, 2), (5, 520), (0, 3, 4, 4)]
    for shape in shapes:
        for training in (True, False):
            tensors = (random(*shape).requires_grad_(), random(*shape).requires_grad_())
            vectors = (random(shape[1]), random(shape[1]).square() + 0.5)
            parameters = (random(shape[1]).requires_grad_(), random(shape[1]).requires_grad_())
            name = "x".join(map(str, shape)) + ("_training" if training else "_evaluation")
            yield SampleInput(name, (*tensors, *vectors, *parameters, training), {})
    x, residual = random(4, 6, 5, 5).requires_grad_(), random(4, 6, 5, 5)
    yield SampleInput("no_vectors", (x, residual, None, None), {"training": True, "eps": 1e-3})
