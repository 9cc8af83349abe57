"""An exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    r"""The moving average of ``model``, to be fed by ``update_parameters(model)`` after every step.

    .. math:: \bar\theta_{t+1} = d_t \bar\theta_t + (1 - d_t) \theta_{t+1},\quad
        d_t = \min(\text{decay}, \tfrac{1 + t}{10 + t}), \quad d_0 = 0

    The smaller :math:`d_t` of the first steps keeps the initial weights out of the average of a
    short run; it is that of TensorFlow's ``ExponentialMovingAverage``.

    Running means and variances of batch norm are averaged along (``use_buffers``), as torchvision's
    reference trainings do. They are moving averages themselves, so an average of them belongs to
    the averaged weights as nearly as those of any one step belong to its weights. The alternative,
    ``update_bn``, is exact, but passes over all training images again before every evaluation.

    State and evaluation are those of torch's ``AveragedModel``. Its own update asks the host how
    many there were; this one leaves the count on the device, so that a CUDA graph can record it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        device = next(model.parameters()).device
        super().__init__(model, device=device, use_buffers=True)
        self.requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights after one more step into the average."""
        count = self.n_averaged.double()
        kept = ((1 + count) / (10 + count)).clamp(max=self._decay) * (count > 0)
        weights: tuple[list[Tensor], list[Tensor]] = ([], [])
        pairs = zip(_values(self.module), _values(model), strict=True)
        for averaged, current in pairs:
            if averaged.is_floating_point():
                weights[0].append(averaged)
                weights[1].append(current)
            else:  # batch norm's number of batches
                averaged.copy_(current)
        torch._foreach_mul_(weights[0], kept.float())
        torch._foreach_add_(weights[0], torch._foreach_mul(weights[1], (1 - kept).float()))
        self.n_averaged.add_(1)


def _values(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
