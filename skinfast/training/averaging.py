"""An exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from skinfast import arena


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
    Model and average are moved into arenas: an update is one pass over each, in one call.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        device = next(model.parameters()).device
        super().__init__(model, device=device, use_buffers=True)
        self.requires_grad_(False)
        self._decay = decay
        arena.lay_out(model)
        arena.lay_out(self.module)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights after one more step into the average."""
        count = self.n_averaged.double()
        kept = ((1 + count) / (10 + count)).clamp(max=self._decay) * (count > 0)
        for averaged, current in zip(_memory(self.module), _memory(model), strict=True):
            if averaged.is_floating_point():
                averaged.lerp_(current, (1 - kept).to(averaged.dtype))
            else:  # batch norm's number of batches
                averaged.copy_(current)
        self.n_averaged.add_(1)


def _memory(model: nn.Module) -> list[Tensor]:
    return arena.flat([*model.parameters(), *model.buffers()])
