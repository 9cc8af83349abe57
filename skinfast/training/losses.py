"""The losses that a run can minimise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skinfast.nn import CrossEntropyLoss
from skinfast.training.config import TrainConfig


class FocalLoss(nn.Module):
    r"""The mean focal loss of a batch (Lin et al., 2017, https://arxiv.org/abs/1708.02002, eq. 5).

    .. math:: \frac{\sum_i w_{y_i} (1 - p_i)^\gamma (-\log p_i)}{\sum_i w_{y_i}}

    with :math:`p_i` the probability given to the true class :math:`y_i` of image i and :math:`w`
    the class weights, the paper's :math:`\alpha`. With :math:`\gamma = 0` it is cross-entropy.

    Args:
        gamma: from 0; how much less the easy images count.
        weight: float ``[C]``, or None: all 1.
    """

    weight: Tensor | None

    def __init__(self, gamma: float = 2.0, weight: Tensor | None = None) -> None:
        super().__init__()
        self.gamma = gamma
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits ``[N, C]`` and labels int64 ``[N]`` to a float32 scalar."""
        log_probability = torch.log_softmax(logits.float(), 1)
        log_p = log_probability.gather(1, labels[:, None]).squeeze(1)
        # 1 - p without cancellation; at exactly 0 a gamma below 1 would have an infinite slope.
        miss = (-torch.expm1(log_p)).clamp_min(torch.finfo(torch.float32).tiny)
        loss = -(miss**self.gamma) * log_p
        if self.weight is None:
            return loss.mean()
        weights = self.weight[labels]
        return (weights * loss).sum() / weights.sum()


def loss_function(config: TrainConfig, weight: Tensor | None) -> nn.Module:
    """The loss of ``config``: logits ``[N, C]`` and labels ``[N]`` to a scalar.

    Args:
        weight: of each class, float ``[C]``, or None: all 1.
    """
    if config.loss == "focal":
        return FocalLoss(config.focal_gamma, weight)
    return CrossEntropyLoss(
        weight=weight, label_smoothing=config.label_smoothing, backend=config.backend
    )
