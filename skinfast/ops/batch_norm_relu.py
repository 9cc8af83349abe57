"""Fused batch normalisation and ReLU."""

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

# The gradients of weight and bias are sums over a channel. Over the 4,320 elements of the largest
# sample PyTorch's own are 10 times assert_close's default from float64 (ours: 1.6 times).
TOLERANCES = {torch.float32: {"rtol": 2e-5, "atol": 2e-4}}


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    statistics: Tensor | None = None,
) -> Tensor:
    r"""``relu(batch_norm(input))``: two passes over memory forward (one in evaluation), two back.

    .. math:: y = \max\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta, 0\right)

    with the mean :math:`\mu` and the biased variance :math:`\sigma^2` of each channel of the batch
    in training, and the running statistics in evaluation. In training the running statistics
    become ``(1 - momentum) * running + momentum * batch``, with the unbiased variance. The
    backward pass reads one bit an element in place of the output.

    Args:
        input: ``[N, C, *]``, float32, float64, bfloat16 or (CUDA) float16; contiguous and, for
            ``[N, C, H, W]``, channels_last are computed as stored.
        running_mean: ``[C]``, or None, which evaluation refuses. Statistics, weight and bias are
            each in input's dtype or, for a 16-bit input, in float32.
        running_var: as running_mean; both or neither.
        weight: :math:`\gamma`, ``[C]``, or None for 1.
        bias: :math:`\beta`, ``[C]``, or None for 0.
        training: whether to normalise by the batch's statistics.
        momentum: the batch's share in the running statistics.
        eps: added to the variance.
        relu: False for the batch normalisation alone.
        statistics: ``[2, C]`` in float32 (float64 for such an input): input's mean and biased
            variance where they are known already, as from :func:`conv2d_statistics`; in training
            only. They are taken for what they say: the gradient is that of normalising by the
            batch's own statistics.

    Returns:
        ``[N, C, *]``, of input's dtype and layout.

    Raises:
        ValueError: in training, where a channel has a single value.
        RuntimeError: a shape, dtype or device does not fit, or the dtype is not supported.
    """
    if training:
        check_values_per_channel(input)
    output, _, mean, variance = torch.ops.skinfast.batch_norm_relu(
        input, weight, bias, running_mean, running_var, training, eps, relu, statistics
    )
    if training:
        update_running_statistics(input, running_mean, running_var, mean, variance, momentum)
    return output


def check_values_per_channel(input: Tensor) -> None:
    """Refuse a batch whose variance is zero by construction, as torch does."""
    if input.dim() >= 2 and input.numel() == input.size(1) > 0:
        raise ValueError(
            "Expected more than 1 value per channel when training, "
            f"got input size {tuple(input.shape)}"
        )


def update_running_statistics(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
) -> None:
    """Move the running statistics, where there are any, towards those of a batch."""
    if running_mean is None or input.numel() == 0:
        return
    count = input.numel() // input.size(1)
    with torch.no_grad():
        torch.ops.skinfast.batch_norm_update_(
            running_mean, running_var, mean, variance, count, momentum
        )


def reference(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    statistics: Tensor | None = None,
) -> Tensor:
    """The same in pure PyTorch, which computes the statistics by itself."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return torch.relu(output) if relu else output


def statistics_of(x: Tensor) -> Tensor:
    """``[2, C]``: mean and biased variance of ``[N, C, *]``, in at least float32."""
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    dims = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(x, dims, correction=0)
    return torch.stack([mean, variance])


def fake_forward(x: Tensor, relu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, mask, mean and variance without their values."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, variance = (x.new_empty(x.size(1), dtype=dtype) for _ in range(2))
    mask = x.new_empty((x.numel() + 7) // 8 if relu else 0, dtype=torch.uint8)
    return empty_in_layout_of(x), mask, mean, variance


@register_fake("batch_norm_relu")
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_forward(x, relu)


@register_fake("batch_norm_relu_backward")
def _(
    grad_output: Tensor,
    x: Tensor,
    mask: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    training: bool,
    eps: float,
    needs_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = empty_in_layout_of(x) if needs_grad_x else x.new_empty(0)
    return grad_x, torch.empty_like(mean), torch.empty_like(mean)


@register_fake("batch_norm_update_")
def _(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    variance: Tensor,
    count: int,
    momentum: float,
) -> None:
    return None


def save_for_backward(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    output: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Keep what the gradient needs; only the first output has one."""
    _, mask, mean, variance = output
    ctx.save_for_backward(x, mask, mean, variance, weight)
    ctx.mark_non_differentiable(mask, mean, variance)
    ctx.set_materialize_grads(False)  # no zeros for those three
    ctx.training, ctx.eps = training, eps
    ctx.bias_dtype = None if bias is None else bias.dtype


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, _, _, training, eps, *_ = inputs
    save_for_backward(ctx, x, weight, bias, training, eps, output)


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    x, mask, mean, variance, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = torch.ops.skinfast.batch_norm_relu_backward(
        grad_output, x, mask, mean, variance, weight, ctx.training, ctx.eps, needs_x
    )
    return (
        grad_x if needs_x else None,
        grad_weight.to(weight.dtype) if needs_weight else None,
        grad_bias.to(ctx.bias_dtype) if needs_bias else None,
        *(None,) * 6,
    )


torch.library.register_autograd(
    "skinfast::batch_norm_relu", _backward, setup_context=_setup_context
)
refuse_double_backward("batch_norm_relu_backward")


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """Calls that cover both statistics, both ends of the tiling, absent vectors and no ReLU."""
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
    shapes += [(40, 6, 2, 2), (5, 520), (3, 16), (0, 3, 4, 4)]
    for shape in shapes:
        for training in (True, False):
            vectors = (random(shape[1]), random(shape[1]).square() + 0.5)
            parameters = (random(shape[1]).requires_grad_(), random(shape[1]).requires_grad_())
            name = "x".join(map(str, shape)) + ("_training" if training else "_evaluation")
            args = (random(*shape).requires_grad_(), *vectors, *parameters, training)
            yield SampleInput(name, args, {})
    x = random(4, 6, 5, 5).requires_grad_()
    yield SampleInput("no_vectors", (x, None, None), {"training": True})
    weight = random(6).requires_grad_()
    yield SampleInput("no_relu", (x, None, None, weight), {"training": True, "relu": False})
    bias = random(6).requires_grad_()
    yield SampleInput("data", (x.detach(), None, None, weight, bias), {"training": True, "eps": 1})
