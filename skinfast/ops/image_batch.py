"""A batch of normalised images from a dataset of bytes, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from skinfast.ops._library import register_fake


def image_batch(
    images: Tensor,
    indices: Tensor,
    scale: Tensor,
    shift: Tensor,
    flips: Tensor | None = None,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Gather images, mirror and normalise them, as a model takes them.

    .. math:: y_{bchw} = \text{scale}_c \cdot x_{n_b, h', w', c} + \text{shift}_c

    where :math:`n` are the ``indices``, :math:`w'` is :math:`W - 1 - w` where bit 0 of
    ``flips[b]`` is set (mirrored left-right), else :math:`w`, and :math:`h'` likewise by bit 1
    (top-bottom). There is no gradient.

    Args:
        images: uint8 ``[N, H, W, 3]``, contiguous.
        indices: int64 ``[B]``, each in [0, N). On the CPU one that is not raises an error; on a
            GPU nothing waits to check them, and it makes an image of NaN.
        scale, shift: float32 ``[3]``.
        flips: uint8 ``[B]``, or None: mirror none.
        layout: how the result is stored: "contiguous" or "channels_last" (in memory
            ``[B, H, W, 3]``).
        dtype: of the result: float32, float64, bfloat16 or (CUDA) float16. The arithmetic is
            float32, and float64 for float64.

    Returns:
        ``[B, 3, H, W]``.

    Raises:
        RuntimeError: an argument does not fit the description above; the message names it.
    """
    return torch.ops.skinfast.image_batch(images, indices, scale, shift, flips, layout, dtype)


@register_fake("image_batch")
def _(
    images: Tensor,
    indices: Tensor,
    scale: Tensor,
    shift: Tensor,
    flips: Tensor | None,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    batch, (_, height, width, _) = indices.shape[0], images.shape
    return torch.empty(
        (batch, 3, height, width),
        dtype=dtype,
        device=images.device,
        memory_format=(
            torch.channels_last if layout == "channels_last" else torch.contiguous_format
        ),
    )
