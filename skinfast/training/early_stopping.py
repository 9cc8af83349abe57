"""The best epoch so far, by the validation part of the training images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class BestEpoch:
    """Keeps the weights of the epoch with the highest balanced accuracy; says when to stop.

    Args:
        patience: epochs without a new best after which to stop; 0: never.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.epoch = 0
        self.balanced_accuracy = -1.0
        self.weights: dict[str, Tensor] = {}

    def see(self, epoch: int, balanced_accuracy: float, model: nn.Module) -> None:
        """Keep a copy of the weights if no epoch before was as good; at a tie the first stays."""
        if balanced_accuracy > self.balanced_accuracy:
            self.epoch, self.balanced_accuracy = epoch, balanced_accuracy
            self.weights = {name: t.detach().clone() for name, t in model.state_dict().items()}

    def should_stop(self, epoch: int) -> bool:
        """Whether ``epoch`` is ``patience`` epochs after the best one."""
        return self.patience > 0 and epoch - self.epoch >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """All that ``load_state_dict`` needs."""
        return {
            "epoch": self.epoch,
            "balanced_accuracy": self.balanced_accuracy,
            "weights": self.weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict``."""
        self.epoch = state["epoch"]
        self.balanced_accuracy = state["balanced_accuracy"]
        self.weights = state["weights"]
