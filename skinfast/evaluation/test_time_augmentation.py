"""Test-time augmentation: one answer from the eight views of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MeanOverViews(nn.Module):
    """A model that gives the mean of another one's probabilities over the 8 dihedral views.

    Its outputs are logarithms of those probabilities, so their softmax is the mean. Eight times the
    work; every image and its mirrored and turned copies get the same answer.

    Args:
        model: images ``[B, 3, H, W]`` with H = W to logits ``[B, C]``; it is put into evaluation
            mode, for training would count every view as a batch.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` to float32 log-probabilities ``[B, C]``."""
        views = dihedral_views(images)
        logs = torch.stack([torch.log_softmax(self.model(v).float(), 1) for v in views])
        return torch.logsumexp(logs, 0) - torch.log(torch.tensor(float(len(views))))


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
