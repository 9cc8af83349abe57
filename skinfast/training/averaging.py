"""An exponential moving average of a model's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    r"""The moving average of ``model``, to be fed by ``update_parameters(model)`` after every step.

    .. math:: \bar\theta_{t+1} = d_t \bar\theta_t + (1 - d_t) \theta_{t+1},\quad
        d_t = \min(\text{decay}, \tfrac{1 + t}{10 + t})

    The smaller :math:`d_t` of the first steps keeps the initial weights out of the average of a
    short run; it is that of TensorFlow's ``ExponentialMovingAverage``.

    Running means and variances of batch norm are averaged along (``use_buffers``), as torchvision's
    reference trainings do. They are moving averages themselves, so an average of them belongs to
    the averaged weights as nearly as those of any one step belong to its weights. The alternative,
    ``update_bn``, is exact, but passes over all training images again before every evaluation.
    """
    average = AveragedModel(model, multi_avg_fn=_moving_average(decay), use_buffers=True)
    return average.requires_grad_(False)


def _moving_average(decay: float) -> Any:
    @torch.no_grad()
    def update(averaged: Any, current: Any, count: Tensor | int) -> None:
        if not averaged[0].is_floating_point():  # batch norm's number of batches
            for a, c in zip(averaged, current, strict=True):
                a.copy_(c)
            return
        # The count is a tensor: arithmetic with it does not wait for a GPU.
        count = torch.as_tensor(count, dtype=torch.float32, device=averaged[0].device)
        share = 1 - ((1 + count) / (10 + count)).clamp(max=decay)
        differences = torch._foreach_sub(current, averaged)
        torch._foreach_mul_(differences, share)
        torch._foreach_add_(averaged, differences)

    return update
