"""Augmentation of a batch on the device where it lives: quarter turns and a little colour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Turn images by random multiples of 90 degrees and vary their colours a little.

    Mirroring happens where the batch is fetched (``DeviceBatches(augment=True)``). A lesion has no
    upright position, so mirrored and turned it is as likely a photograph as it was; the eight views
    that arise so lose nothing, for pixels only change their places.

    What is drawn follows from (seed, epoch, batch) alone. It is drawn on the CPU, so every device
    sees the same, and a resumed run sees what an uninterrupted one would have.

    Attributes:
        rotate: turn each image by 0, 90, 180 or 270 degrees, each with probability 1/4.
        color_jitter: J, from 0. In units in which colours have a standard deviation of 1 over the
            training set, each image keeps its mean colour and has its contrast multiplied by
            U(1 - J, 1 + J), then is shifted by U(-J, J) as a whole (brightness) and by
            U(-J/2, J/2) in each of R, G and B (the tint of the lamp).
    """

    rotate: bool = False
    color_jitter: float = 0.0
    seed: int = 0

    def __call__(self, images: Tensor, epoch: int, batch: int) -> Tensor:
        """Augment normalised images, float ``[B, 3, H, W]`` with H = W; stored as they were."""
        if not self.rotate and not self.color_jitter:
            return images
        # SeedSequence mixes the numbers: their sum would repeat draws from one epoch to the next.
        mixed = np.random.SeedSequence([self.seed, epoch, batch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        # Both are always drawn, so that switching one off leaves the other's draws as they were.
        turns = torch.randint(4, (len(images),), generator=generator)
        uniform = 2 * torch.rand(len(images), 5, generator=generator) - 1
        if self.rotate:
            images = rotated(images, turns)
        if self.color_jitter:
            images = _jittered(images, self.color_jitter * uniform.to(images))
        return images


def rotated(images: Tensor, turns: Tensor) -> Tensor:
    """Turn image b by ``turns[b]`` times 90 degrees counter-clockwise, exactly.

    Args:
        images: ``[B, C, H, W]`` with H = W.
        turns: integer ``[B]``, each from 0 to 3, on the CPU (a GPU would have to be waited for).

    Returns:
        ``[B, C, H, W]``, stored as ``images`` are.
    """
    result = images.clone()
    for quarter in (1, 2, 3):
        rows = (turns == quarter).nonzero().flatten().to(images.device)
        result[rows] = torch.rot90(images[rows], quarter, (2, 3))
    return result


def _jittered(images: Tensor, amounts: Tensor) -> Tensor:
    """Change contrast, brightness and tint by ``amounts`` ``[B, 5]``."""
    contrast, brightness, tint = amounts.split((1, 1, 3), dim=1)
    mean = images.mean((2, 3))
    gain = 1 + contrast
    shift = mean * (1 - gain) + brightness + tint / 2
    return images * gain[:, :, None, None] + shift[:, :, None, None]


def dihedral_views(images: Tensor) -> list[Tensor]:
    """The eight views of a square: four quarter turns, each also mirrored.

    Args:
        images: ``[B, C, H, W]`` with H = W.

    Returns:
        Eight tensors ``[B, C, H, W]``, each stored as ``images`` are; the first equals ``images``.
    """
    views = [
        torch.rot90(mirrored, turns, (2, 3))
        for mirrored in (images, images.flip(3))
        for turns in range(4)
    ]
    # A model is fast on the layout that the batch came in.
    return [torch.empty_like(images).copy_(view) for view in views]
