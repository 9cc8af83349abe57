"""Maximum pooling that keeps one byte per output for its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skinfast.ops._library import (
    SampleInput,
    empty_in_layout_of,
    layout_of,
    refuse_double_backward,
    register_fake,
)

IntOrPair = int | tuple[int, int]


def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    r"""The maximum over each window, as :func:`torch.nn.functional.max_pool2d`.

    .. math:: y_{n c i j} = \max_{k, l} \; x_{n, c, \; s_h i - p_h + d_h k, \; s_w j - p_w + d_w l}

    over the taps (k, l) of the window that lie inside. NaN is the greatest value. The gradient
    goes to the maximum; to the first, row by row, of several that are equal. What is kept for it
    is the maximum's position in its window, one byte, where torch keeps eight. On CUDA each
    pixel gathers its gradient; on the CPU one thread adds up a whole map. Both in a fixed order,
    so two runs are equal bit for bit.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, float32, float64, bfloat16 or (CUDA) float16.
        kernel_size: the window's height and width, an int or a pair; at most 255 positions.
        stride: from one window to the next; by default ``kernel_size``.
        padding: rows and columns that count as minus infinity on each side; at most half of
            ``kernel_size``.
        dilation: the distance between the taps of a window.
        ceil_mode: also take windows that hang over the end, if they start before it.

    Returns:
        ``[N, C, OH, OW]`` or ``[C, OH, OW]``, of x's dtype, in x's layout where x is dense
        (contiguous or channels_last).

    Raises:
        RuntimeError: input or a parameter is not as above, or no window fits into it.
    """
    parameters = pool_parameters(kernel_size, stride, padding, dilation, ceil_mode)
    if input.dim() == 3:
        return torch.ops.skinfast.max_pool2d(input.unsqueeze(0), *parameters)[0].squeeze(0)
    return torch.ops.skinfast.max_pool2d(input, *parameters)[0]


def reference(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The same in pure PyTorch."""
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def _pair(value: IntOrPair) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def pool_parameters(
    kernel_size: IntOrPair,
    stride: IntOrPair | None,
    padding: IntOrPair,
    dilation: IntOrPair,
    ceil_mode: bool,
) -> tuple[list[int], list[int], list[int], list[int], bool]:
    """The parameters of a pool as the low-level ops take them."""
    return (
        _pair(kernel_size),
        _pair(kernel_size if stride is None else stride),
        _pair(padding),
        _pair(dilation),
        ceil_mode,
    )


def pooled_shape(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> tuple[int, ...]:
    """[N, C, OH, OW]."""
    axes = zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    return (*x.shape[:2], *(_output_size(*axis, ceil_mode) for axis in axes))


def _output_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    output = (room + stride - 1) // stride + 1
    return output - 1 if (output - 1) * stride >= size + padding else output


@register_fake("max_pool2d")
def _(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    shape = pooled_shape(x, kernel_size, stride, padding, dilation, ceil_mode)
    return empty_in_layout_of(x, shape), empty_in_layout_of(x, shape, torch.uint8)


@register_fake("max_pool2d_backward")
def _(
    grad_output: Tensor,
    argmax: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    channels_last: bool,
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        input_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=layout
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.parameters = inputs
    _, argmax = output
    ctx.input_size = x.shape
    # Not argmax's layout: a 1x1 map is both contiguous and channels_last.
    ctx.channels_last = layout_of(x) == torch.channels_last
    ctx.mark_non_differentiable(argmax)
    ctx.set_materialize_grads(False)  # else torch fills a gradient for argmax with zeros
    ctx.save_for_backward(argmax)


def _backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.parameters)
    if grad_output is None:
        return None, *nothing
    (argmax,) = ctx.saved_tensors
    grad = torch.ops.skinfast.max_pool2d_backward(
        grad_output, argmax, ctx.input_size, *ctx.parameters, ctx.channels_last
    )
    return grad, *nothing


torch.library.register_autograd("skinfast::max_pool2d", _backward, setup_context=_setup_context)
refuse_double_backward("max_pool2d_backward")


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """The models' pools, every parameter, tails of every vector width, one image, none."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((2, 10, 16, 16), {"kernel_size": 2}),
        ((2, 10, 11, 10), {"kernel_size": 3}),
        ((2, 10, 10, 10), {"kernel_size": 4}),
        ((1, 3, 7, 40), {"kernel_size": 3}),
        ((1, 2, 9, 32), {"kernel_size": 4}),
        ((2, 16, 9, 8), {"kernel_size": 3, "stride": 2, "padding": 1}),
        ((1, 70, 7, 80), {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)}),
        ((2, 3, 9, 11), {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": (2, 3)}),
        ((2, 3, 8, 7), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
        ((2, 3, 8, 9), {"kernel_size": 2, "stride": 3, "ceil_mode": True}),
        ((4, 6, 7), {"kernel_size": 2}),
        ((0, 3, 4, 4), {"kernel_size": 2}),
    ]
    for shape, parameters in cases:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        name = "x".join(map(str, shape)) + "".join(f"-{v}" for v in parameters.values())
        yield SampleInput(
            name.replace(" ", ""), (x.to(device, dtype).requires_grad_(),), parameters
        )
