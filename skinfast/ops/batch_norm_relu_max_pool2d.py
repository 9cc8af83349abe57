"""Fused batch normalisation, ReLU and maximum pooling: the stem of a ResNet."""

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
)
from skinfast.ops.batch_norm_relu import (
    check_values_per_channel,
    save_for_backward,
    update_running_statistics,
)
from skinfast.ops.max_pool2d import IntOrPair, pool_parameters, pooled_shape

# As for batch_norm_relu, whose sums over a channel these are.
TOLERANCES = {torch.float32: {"rtol": 2e-5, "atol": 2e-4}}


def batch_norm_relu_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    r"""``max_pool2d(relu(batch_norm(input)))``; what lies between norm and pool is not stored.

    .. math:: y_{n c i j} = \max_{k, l} \;
              \max\left(\frac{x_{n c p q} - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} \gamma_c
              + \beta_c, 0\right), \qquad
              p = s_h i - p_h + d_h k, \quad q = s_w j - p_w + d_w l

    over the taps (k, l) of the window that lie inside, as in ResNet's stem (He et al.,
    https://arxiv.org/abs/1512.03385, table 1). Outputs, gradients and running statistics equal
    those of :func:`batch_norm_relu` and :func:`max_pool2d` one after the other, bit for bit. Kept
    for the gradient is, besides ``input``, one byte an output: the maximum's position, or that the
    ReLU stops its gradient.

    Args:
        input: ``[N, C, H, W]``, float32, float64, bfloat16 or (CUDA) float16; contiguous and
            channels_last are computed as stored.
        running_mean, running_var, weight, bias, training, momentum, eps: as for
            :func:`batch_norm_relu`.
        kernel_size, stride, padding, dilation, ceil_mode: as for :func:`max_pool2d`.

    Returns:
        ``[N, C, OH, OW]``, of input's dtype and layout.

    Raises:
        ValueError: in training, where a channel has a single value.
        RuntimeError: a shape, dtype or device does not fit, the dtype is not supported, or no
            window fits into the input.
    """
    if training:
        check_values_per_channel(input)
    parameters = pool_parameters(kernel_size, stride, padding, dilation, ceil_mode)
    output, _, mean, variance = torch.ops.skinfast.batch_norm_relu_max_pool2d(
        input, weight, bias, running_mean, running_var, training, eps, *parameters
    )
    if training:
        update_running_statistics(input, running_mean, running_var, mean, variance, momentum)
    return output


def reference(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The same in pure PyTorch."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.max_pool2d(torch.relu(output), kernel_size, stride, padding, dilation, ceil_mode)


# Gradients of weight and bias have a few values, of which PyTorch's may by luck all be near the
# exact ones: of three in float16 they were 4.1 and 6.0 times nearer than ours, which were off by
# 2.6e-3 and 1.9e-3, about what it is to be rounded.
LOW_PRECISION_FACTORS = {torch.float16: 7.0}


@register_fake("batch_norm_relu_max_pool2d")
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = pooled_shape(x, kernel_size, stride, padding, dilation, ceil_mode)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, variance = (x.new_empty(x.size(1), dtype=dtype) for _ in range(2))
    argmax = empty_in_layout_of(x, shape, torch.uint8)
    return empty_in_layout_of(x, shape), argmax, mean, variance


@register_fake("batch_norm_relu_max_pool2d_backward")
def _(
    grad_output: Tensor,
    argmax: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    training: bool,
    eps: float,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    needs_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = empty_in_layout_of(x) if needs_grad_x else x.new_empty(0)
    return grad_x, torch.empty_like(mean), torch.empty_like(mean)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, _, _, training, eps, *ctx.pool = inputs
    save_for_backward(ctx, x, weight, bias, training, eps, output)


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    x, argmax, mean, variance, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = torch.ops.skinfast.batch_norm_relu_max_pool2d_backward(
        grad_output, argmax, x, mean, variance, weight, ctx.training, ctx.eps, *ctx.pool, needs_x
    )
    return (
        grad_x if needs_x else None,
        grad_weight.to(weight.dtype) if needs_weight else None,
        grad_bias.to(ctx.bias_dtype) if needs_bias else None,
        *(None,) * 9,
    )


torch.library.register_autograd(
    "skinfast::batch_norm_relu_max_pool2d", _backward, setup_context=_setup_context
)
refuse_double_backward("batch_norm_relu_max_pool2d_backward")


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """ResNet's pool and every parameter of one, both statistics, every tail, absent vectors."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    cases: list[tuple[tuple[int, int, int, int], dict[str, Any]]] = [
        ((2, 16, 9, 8), {"kernel_size": 3, "stride": 2, "padding": 1}),
        ((3, 10, 8, 8), {"kernel_size": 2}),
        ((2, 6, 17, 20), {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)}),
        ((2, 3, 9, 11), {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": (2, 3)}),
        ((2, 8, 8, 7), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
        ((130, 3, 2, 3), {"kernel_size": 2, "stride": 3, "ceil_mode": True}),
        ((0, 3, 4, 4), {"kernel_size": 2}),
    ]
    for shape, pool in cases:
        for training in (True, False):
            vectors = (random(shape[1]), random(shape[1]).square() + 0.5)
            parameters = (random(shape[1]).requires_grad_(), random(shape[1]).requires_grad_())
            name = "x".join(map(str, shape)) + "".join(f"-{v}" for v in pool.values())
            name = name.replace(" ", "") + ("_training" if training else "_evaluation")
            args = (random(*shape).requires_grad_(), *vectors, *parameters, training)
            yield SampleInput(name, args, pool)
    x, bias = random(2, 6, 5, 5), random(6).requires_grad_()
    yield SampleInput("no_vectors", (x.requires_grad_(), None, None), {"training": True, **pool})
    data = (x.detach(), None, None, random(6).requires_grad_(), bias)
    yield SampleInput("data", data, {"training": True, "eps": 1, **pool})
