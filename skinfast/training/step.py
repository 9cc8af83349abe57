"""One optimisation step, and the sums of an epoch that stay on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from skinfast.data import DeviceBatches
from skinfast.ops import classification_totals_
from skinfast.optim import Adam
from skinfast.training.averaging import MovingAverage
from skinfast.training.capture import CapturedStep, LowPrecisionCopies
from skinfast.training.graph import CudaGraphs, DeviceEpochs, Launcher
from skinfast.training.heap import keep_freed_memory


class TrainStep:
    """Forward, loss, backward and update; loss and correct answers are summed on the device.

    Args:
        model: images ``[B, 3, H, W]`` to logits ``[B, C]``.
        optimizer: over the model's parameters.
        loss_function: logits and labels ``[B]`` to the mean loss.
        precision: "float32", or "bfloat16" for autocast with float32 parameters.
        capture: on a CPU, record the step when a shape of a batch comes for the first time and
            replay it, then and whenever the shape comes again (see ``CapturedStep``): for a model
            whose forward pass keeps no tensor outside its parameters and buffers; what a step frees
            is kept for the next one (see ``keep_freed_memory``); on a GPU, launch
            whole epochs as CUDA graphs (see ``DeviceEpochs``). The optimizer must be
            ``skinfast.optim.Adam``. No hook runs in a replay, so a model in
            DistributedDataParallel is never captured. The results are equal bit for bit.
        launcher: for ``DeviceEpochs``; None: CUDA graphs on a GPU, on a CPU no such epochs.

    Raises:
        TypeError: ``capture`` with another optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_function: nn.Module,
        *,
        device: torch.device,
        precision: str,
        capture: bool = False,
        launcher: Launcher | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_function = loss_function
        self.device = device
        self.precision = precision
        self._totals = Totals(device)
        if capture and not isinstance(optimizer, Adam):
            raise TypeError(
                f"capture needs skinfast.optim.Adam; the optimizer is {type(optimizer).__name__}"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            capture = False  # it exchanges gradients in hooks
        if capture and launcher is None and device.type == "cuda":
            launcher = CudaGraphs(device)
        self._launcher = launcher
        self._epochs: DeviceEpochs | None = None
        self._capture = capture and device.type == "cpu"
        if self._capture:
            keep_freed_memory()
        self._captured: dict[Any, CapturedStep] = {}
        self._copies = LowPrecisionCopies()

    def epoch(
        self,
        batches: DeviceBatches,
        schedule: LRScheduler | None = None,
        average: MovingAverage | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Learn from every batch of the epoch that ``batches`` is set to.

        Args:
            schedule: stepped after every step.
            average: fed after every step.
            progress: called with the number of steps, whenever some are done or launched.
        """
        if self._launcher is not None:
            known = self._epochs
            if known is None or (known.batches, known.average) != (batches, average):
                self._epochs = DeviceEpochs(
                    self._learn,
                    self._record,
                    self.model,
                    self.optimizer,
                    batches,
                    average,
                    self._launcher,
                )
            assert self._epochs is not None
            self._epochs.run(schedule, progress or _ignore)
            return
        for images, labels in batches:
            self(images, labels)
            if schedule is not None:
                schedule.step()
            if average is not None:
                average.update_parameters(self.model)
            (progress or _ignore)(1)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Learn from one batch."""
        if not self._capture:
            self._learn(images, labels)
            return
        shapes = images.shape, images.stride(), images.dtype, self.model.training
        if (shapes, self._state()) not in self._captured:
            # Not by an eager step, whose gradients and casts take memory that no replay needs.
            assert isinstance(self.optimizer, Adam)
            self.optimizer.make_states()
            self._captured[shapes, self._state()] = self._record(images, labels)
        self._captured[shapes, self._state()].replay(images, labels)

    def _record(self, images: Tensor, labels: Tensor) -> CapturedStep:
        # What only concerns buffers, such as batch norm's count of batches, is computed meanwhile.
        before = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            return CapturedStep(self._learn, (images, labels), self.optimizer, self._copies)
        finally:
            for buffer, value in before:
                buffer.copy_(value)

    def _state(self) -> int:
        """Another number when the optimizer has made or loaded another state."""
        state = next(iter(self.optimizer.state.values()), None)
        return 0 if state is None else id(state["exp_avg"])

    def _learn(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            logits = self.model(images)
            loss = self.loss_function(logits, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._totals.add(loss.detach(), logits.detach(), labels)

    def take_totals(self) -> tuple[float, float]:
        """Mean loss and accuracy since the last call; waits for the device once."""
        return self._totals.take()


def _ignore(steps: int) -> None:
    """For callers to whom the progress is nothing."""


class Totals:
    """Loss, correct answers and images, summed on the device without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, mean_loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count one batch."""
        classification_totals_(self._sums, mean_loss, logits, labels)

    def take(self) -> tuple[float, float]:
        """Mean loss and accuracy of what was counted; starts again from zero."""
        loss, correct, count = self._sums.tolist()
        self._sums.zero_()
        return loss / count, correct / count


def autocast(device: torch.device, precision: str) -> Any:
    """The context in which a model computes in ``precision``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


@torch.no_grad()
def logits_of(model: nn.Module, batches: Any, device: torch.device, precision: str) -> Tensor:
    """The model's answers to all batches in evaluation mode: float32 ``[N, C]``."""
    was_training = model.training
    model.eval()
    with autocast(device, precision):
        logits = [model(images).float() for images, _ in batches]
    model.train(was_training)
    return torch.cat(logits)
