"""Batches in which every class is as frequent as any other."""

from __future__ import annotations

import numpy as np
import torch

from skinfast.data.batches import DeviceBatches


class BalancedBatches(DeviceBatches):
    """``DeviceBatches`` that draw, every epoch anew, equally many images of each class.

    An epoch is as long as it would be otherwise. Images of a class come in random order, each as
    often as any other of its class but for one. Consecutive images go through the classes in turn,
    in random order each time, so that the classes of any batch differ by at most two images.

    As in ``DeviceBatches`` the draw follows from (seed, epoch) alone.
    """

    def _draw_order(self) -> torch.Tensor:
        generator = np.random.default_rng([self.seed, self.epoch])
        indices = self.indices.cpu().numpy()
        labels = self.labels.cpu().numpy()[indices]
        classes = np.unique(labels)
        rounds = -(-len(indices) // len(classes))
        turns = generator.permuted(np.tile(np.arange(len(classes)), (rounds, 1)), axis=1)
        dealt = np.stack([_deal(indices[labels == c], rounds, generator) for c in classes])
        return torch.from_numpy(
            dealt[turns, np.arange(rounds)[:, None]].reshape(-1)[: len(indices)]
        )


def _deal(
    members: np.ndarray[tuple[int], np.dtype[np.int64]], count: int, generator: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """``count`` of the members: shuffled, and shuffled again when all have been dealt."""
    rounds = -(-count // len(members))
    return np.concatenate([generator.permutation(members) for _ in range(rounds)])[:count]
