"""The mean of every feature map: what stands between a ResNet's convolutions and its classifier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from skinfast.ops._library import (
    SampleInput,
    layout_of,
    refuse_double_backward,
    register_fake,
)


def global_average_pool2d(input: Tensor) -> Tensor:
    r"""``mean(input, (2, 3))``, as :func:`torch.nn.functional.adaptive_avg_pool2d` to 1x1, flat.

    .. math:: y_{n c} = \frac{1}{H W} \sum_{i, j} x_{n c i j}, \qquad
              \frac{\partial L}{\partial x_{n c i j}} =
              \frac{1}{H W} \frac{\partial L}{\partial y_{n c}}

    Lin et al., https://arxiv.org/abs/1312.4400, section 3.2. Sums are in float32 for 16-bit types;
    nothing is kept for the gradient, which comes in input's layout, so that what lies before needs
    no copy of it. Two runs are equal bit for bit.

    Args:
        input: ``[N, C, H, W]``, float32, float64, bfloat16 or (CUDA) float16, any layout.

    Returns:
        ``[N, C]``, contiguous, of input's dtype.

    Raises:
        RuntimeError: input is not as above, or has no pixel.
    """
    return torch.ops.skinfast.global_average_pool2d(input)


def reference(input: Tensor) -> Tensor:
    """The same in pure PyTorch."""
    return torch.mean(input, (2, 3))


@register_fake("global_average_pool2d")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2])


@register_fake("global_average_pool2d_backward")
def _(grad_output: Tensor, input_size: list[int], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        input_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=layout
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    (x,) = inputs
    ctx.input_size = x.shape
    ctx.channels_last = layout_of(x) == torch.channels_last


def _backward(ctx: Any, grad_output: Tensor) -> Tensor:
    return torch.ops.skinfast.global_average_pool2d_backward(
        grad_output, ctx.input_size, ctx.channels_last
    )


torch.library.register_autograd(
    "skinfast::global_average_pool2d", _backward, setup_context=_setup_context
)
refuse_double_backward("global_average_pool2d_backward")


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """The model's maps, tails of vectors and of tiles, maps that threads share, nothing."""
    generator = torch.Generator().manual_seed(0)
    for shape in [
        (2, 64, 2, 2),
        (3, 80, 1, 1),
        (2, 16, 7, 7),
        (2, 67, 3, 5),
        (1, 16, 24, 16),
        (3, 3, 17, 19),
        (1, 300, 1, 3),
        (0, 3, 4, 4),
    ]:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        name = "x".join(map(str, shape))
        yield SampleInput(name, (x.to(device, dtype).requires_grad_(),), {})
