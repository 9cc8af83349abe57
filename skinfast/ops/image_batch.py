"""A batch of augmented, normalised images from a dataset of bytes, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from skinfast.ops._library import register_fake


def image_batch(
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    clock: Tensor | None = None,
    batch_size: int | None = None,
    draws: Tensor | None = None,
    seed: int = 0,
    mirror: bool = False,
    rotate: bool = False,
    color_jitter: float = 0.0,
    means: Tensor | None = None,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    r"""Gather images and labels; augment and normalise the images, as a model takes them.

    .. math:: y_{bchw} = \text{scale}_c \cdot x_{n_b, h', w', c} + \text{shift}_c

    where :math:`n_b` is ``indices[clock[1] + b]``. Which batch it is stands on the device, so that
    a recorded CUDA graph fetches another one whenever ``clock`` has advanced. There is no gradient.

    What is random follows from (``seed``, epoch, draw) alone, by Philox4x32-10 (Salmon et al.,
    2011), the same bits on every device and in batches of every size: the key is ``seed``, the
    counter is (draw, draw / 2^32, epoch, block). Of block 0, word 0 says by bit 0 whether the image
    is mirrored left-right, by bit 1 whether top-bottom, and by bits 2 and 3 by how many quarter
    turns it is then turned counter-clockwise. With J = ``color_jitter`` its contrast is multiplied
    by U(1 - J, 1 + J) (block 0, word 1) while it keeps its mean colour, then U(-J, J) (block 1,
    word 0) is added to it as a whole and U(-J/2, J/2) (block 1, words 1 to 3) to each of R, G and
    B, in units of ``y``. Each is drawn whether or not the others are asked for.

    Args:
        images: uint8 ``[N, H, W, 3]``, contiguous.
        labels: int64 ``[N]``.
        indices: int64 ``[M]``, each in [0, N). On the CPU one that is not raises an error; on a
            GPU nothing waits to check them, and it makes an image of NaN with label 0, in uint8 one
            of zeros with label -1.
        scale, shift: float32 ``[3]``; not applied to a batch of uint8.
        clock: int64 ``[2]``: the number of the epoch (of which 32 bits count), and the place in
            ``indices`` of the batch's first image. None: 0 and 0.
        batch_size: B, at most M. None: M.
        draws: int64 ``[M]``: images with equal ones are changed alike. None: ``indices``.
        seed: from 0 to 2^63 - 1.
        mirror, rotate: whether to do that; an image to be turned must be square.
        color_jitter: J, from 0 (nothing changes), which a batch of uint8 needs.
        means: float32 ``[N, 3]``, the mean byte of each image's channels; needed by
            ``color_jitter``.
        layout: how the images are stored: "contiguous" or "channels_last" (in memory
            ``[B, H, W, 3]``).
        dtype: of the images: float32, float64, bfloat16 or (CUDA) float16; the arithmetic is
            float32, and float64 for float64. Or uint8: the bytes, mirrored and turned alone.

    Returns:
        Images ``[B, 3, H, W]`` and labels int64 ``[B]``.

    Raises:
        RuntimeError: an argument does not fit the description above; the message names it.
    """
    if clock is None:
        clock = indices.new_zeros(2)
    return torch.ops.skinfast.image_batch(
        images,
        labels,
        indices,
        indices if draws is None else draws,
        clock,
        len(indices) if batch_size is None else batch_size,
        scale,
        shift,
        means,
        seed,
        mirror,
        rotate,
        color_jitter,
        layout,
        dtype,
    )


def mean_bytes(images: Tensor) -> Tensor:
    """The ``means`` of ``images``, uint8 ``[N, H, W, 3]``: float32 ``[N, 3]``.

    The sums are exact, so every device computes the same bits.
    """
    # In parts: where a device sums a copy in int64, it is not one of all images.
    sums = [part.sum((1, 2), dtype=torch.int64) for part in images.split(256)]
    pixels = max(1, images.shape[1] * images.shape[2])
    return (torch.cat(sums).double() / pixels).float()


@register_fake("image_batch")
def _(
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    draws: Tensor,
    clock: Tensor,
    batch_size: int,
    scale: Tensor,
    shift: Tensor,
    means: Tensor | None,
    seed: int,
    mirror: bool,
    rotate: bool,
    color_jitter: float,
    layout: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _, height, width, _ = images.shape
    output = torch.empty(
        (batch_size, 3, height, width),
        dtype=dtype,
        device=images.device,
        memory_format=(
            torch.channels_last if layout == "channels_last" else torch.contiguous_format
        ),
    )
    return output, labels.new_empty((batch_size,))
