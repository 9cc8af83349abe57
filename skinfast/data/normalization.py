"""Mean and standard deviation of each colour, exactly."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from skinfast.errors import SkinfastError

RGB = tuple[float, float, float]

# Keeps the temporary copy of a chunk at about 100 MB for 64x64 images.
_CHUNK_PIXELS = 1 << 22


def channel_statistics(
    images: torch.Tensor, indices: npt.ArrayLike | None = None
) -> tuple[RGB, RGB]:
    """Mean and (population) standard deviation of R, G and B, in units where 255 is 1.

    Exact but for the last rounding: pixel values are counted, and sums over the counts are whole
    numbers. So the result depends on neither the order of the images nor the machine.

    Args:
        images: uint8 ``[N, H, W, 3]``.
        indices: integer ``[M]``, the images to count (the training set's); None means all.

    Returns:
        mean, std: three floats each. A colour that never varies has a std of 0.

    Raises:
        SkinfastError: images of another dtype or shape, or none at all.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise SkinfastError(
            f"images are {images.dtype} {list(images.shape)}; give uint8 [N, H, W, 3]"
        )
    chosen = torch.arange(len(images)) if indices is None else torch.as_tensor(np.asarray(indices))
    if not len(chosen):
        raise SkinfastError("statistics need at least one image; the set is empty")
    histogram = torch.zeros(3, 256, dtype=torch.int64)
    step = max(1, _CHUNK_PIXELS // (images.shape[1] * images.shape[2]))
    for part in chosen.split(step):
        pixels = images.index_select(0, part.to(images.device)).reshape(-1, 3)
        for channel in range(3):
            histogram[channel] += torch.bincount(pixels[:, channel], minlength=256).cpu()
    mean_r, std_r = _mean_and_std(histogram[0].tolist())
    mean_g, std_g = _mean_and_std(histogram[1].tolist())
    mean_b, std_b = _mean_and_std(histogram[2].tolist())
    return (mean_r, mean_g, mean_b), (std_r, std_g, std_b)


def _mean_and_std(counts: list[int]) -> tuple[float, float]:
    # Python's whole numbers do not overflow and the difference below does not cancel.
    total = sum(counts)
    first = sum(value * count for value, count in enumerate(counts))
    second = sum(value * value * count for value, count in enumerate(counts))
    variance = (total * second - first * first) / total**2
    return first / total / 255, math.sqrt(variance) / 255
