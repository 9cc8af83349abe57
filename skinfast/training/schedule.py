"""How the learning rate goes over a run, step by step."""

from __future__ import annotations

import torch
from torch.optim import lr_scheduler

from skinfast.training.config import TrainConfig

#: Where "one-cycle" is at its highest when no warm-up is given, as in torch and Smith and Topin.
_ONE_CYCLE_RISE = 0.3
#: Warm-up begins with this share of the learning rate; zero would waste the first step.
_WARMUP_START = 0.01


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> lr_scheduler.LRScheduler | None:
    """The schedule of ``config``, to be stepped after every step of ``optimizer``.

    - "constant": ``lr``.
    - "cosine": from ``lr`` to 0 along half a cosine (Loshchilov and Hutter, 2017, no restarts).
    - "one-cycle": up to ``lr`` and down to nearly 0 (Smith and Topin, 2018), without the cycle of
      momentum, so that ``beta1`` stays what it was set to: of what an optimizer's groups hold, a
      captured step reads the learning rates anew and nothing else.
    - "step": multiplied by ``lr_step_factor`` after every ``lr_step_epochs`` epochs.

    Before each of them ``warmup_epochs`` raise the rate linearly; one-cycle's own rise takes them.

    Returns:
        A scheduler of torch's, or None where the rate never changes.
    """
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.lr_schedule == "one-cycle":
        # The highest rate is at step length - 1. torch divides by what is before and behind it, so
        # the first step and the last are half a step from it at least.
        length = min(max(warmup, 1.5), total - 0.5)
        return lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=config.lr,
            total_steps=total,
            pct_start=length / total if warmup else _ONE_CYCLE_RISE,
            cycle_momentum=False,
        )
    after: lr_scheduler.LRScheduler | None = None
    if config.lr_schedule == "cosine":
        after = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, total - warmup))
    elif config.lr_schedule == "step":
        after = lr_scheduler.StepLR(
            optimizer, config.lr_step_epochs * steps_per_epoch, config.lr_step_factor
        )
    if not warmup:
        return after
    if after is None:
        return lr_scheduler.LinearLR(optimizer, _WARMUP_START, total_iters=warmup)
    rise = lr_scheduler.LinearLR(optimizer, _WARMUP_START, total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, after], milestones=[warmup])
