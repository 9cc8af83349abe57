"""Epochs whose steps ask the host for nothing, several of them a launch of a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from skinfast.data import DeviceBatches
from skinfast.training.averaging import MovingAverage
from skinfast.training.capture import CapturedStep

#: Steps in one launch: enough to hide what a launch costs, few enough to be recorded in seconds.
STEPS_PER_LAUNCH = 8

Learn = Callable[[Tensor, Tensor], None]


class Launcher(Protocol):
    """Records a function's work on the device, to be launched again and again."""

    def active(self) -> AbstractContextManager[None]:
        """Where functions are recorded and launched, and where they may be run as they are."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """What launches the work of ``function``; recording does none of it."""


class CudaGraphs:
    """Functions in CUDA graphs, which share the memory of their intermediate results.

    They may, for they run one after the other on one stream and nothing that a graph allocates
    outlives it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def active(self) -> Iterator[None]:
        """A stream of its own, as recording needs it, between two of the caller's."""
        callers = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(callers)
        with torch.cuda.stream(self._stream):
            yield
        callers.wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record ``function``, which must have run before: the first run allocates and tunes."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            function()
        return graph.replay


class DeviceEpochs:
    """Epochs of steps that find batch, augmentation and learning rate by a clock on the device.

    A step of a size of batch is made as it is the first time, which makes the optimizer's state,
    and recorded from then on; so is the short batch at the end of an epoch, on its own. What was
    recorded is dropped when parameters, buffers or the optimizer's state have moved in memory. The
    results are bit for bit those of the same steps made one by one.

    Args:
        learn: one step on images and labels, without a word from the host. Every learning rate
            that it needs is in the optimizer's groups.
        record: makes of images and labels a recording of ``learn``; None: launch ``learn`` itself.
        average: fed after every step.
    """

    def __init__(
        self,
        learn: Learn,
        record: Callable[[Tensor, Tensor], CapturedStep] | None,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: DeviceBatches,
        average: MovingAverage | None,
        launcher: Launcher,
    ) -> None:
        device = batches.images.device
        self.batches = batches
        self.average = average
        self._learn, self._record = learn, record
        self._model, self._optimizer = model, optimizer
        self._launcher = launcher
        # Where a recording reads and writes, epoch for epoch.
        self._order, self._draws = torch.zeros(
            2, len(batches.indices), dtype=torch.int64, device=device
        )
        # The epoch, the place of the next batch's first image, the number of the next step.
        self._clock = torch.zeros(3, dtype=torch.int64, device=device)
        self._advances = {
            size: torch.tensor([0, size, 1], device=device) for size in batches.batch_sizes()
        }
        groups = len(optimizer.param_groups)
        # Of each step and group; float64, as a number in Python is.
        self._rates = torch.zeros(len(batches), groups, dtype=torch.float64, device=device)
        self._rate = torch.zeros(1, groups, dtype=torch.float64, device=device)
        self._rate_of_group = self._rate[0].unbind()
        self._memory: list[int] | None = None
        self._recordings: dict[int, CapturedStep] = {}  # of a step, by the size of its batch
        self._launches: dict[tuple[int, int], Callable[[], None]] = {}  # by size and steps

    def run(self, schedule: LRScheduler | None, progress: Callable[[int], object]) -> None:
        """Make every step of the epoch that ``batches`` is set to.

        Args:
            schedule: is stepped as often as there are steps.
            progress: called with the number of steps, whenever some have been launched.
        """
        self._set_up(schedule)
        if self._memory != self._addresses():
            self._recordings.clear()
            self._launches.clear()
        for recording in self._recordings.values():
            recording.refresh()
        sizes = self.batches.batch_sizes()
        with self._launcher.active(), self._rates_on_device():
            done = 0
            while done < len(sizes):
                steps = self._advance(sizes[done], sizes[done:].count(sizes[done]))
                done += steps
                progress(steps)
        self._memory = self._addresses()

    def state(self) -> list[Tensor]:
        """What a step changes here."""
        return [self._clock, self._rate]

    def _set_up(self, schedule: LRScheduler | None) -> None:
        order, draws = self.batches.draw()
        self._order.copy_(order)
        self._draws.copy_(draws)
        self._clock.copy_(torch.tensor([self.batches.epoch, 0, 0]))
        rates = []
        with warnings.catch_warnings():
            # Of a schedule that runs ahead of its optimizer, as it does here.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for _ in range(len(self.batches)):
                rates.append([float(group["lr"]) for group in self._optimizer.param_groups])
                if schedule is not None:
                    schedule.step()
        self._rates.copy_(torch.tensor(rates, dtype=torch.float64))

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """The groups' learning rates as tensors; afterwards the numbers that they were."""
        groups = self._optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rate_of_group, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number

    def _advance(self, size: int, left: int) -> int:
        """Make one or several of the ``left`` steps with batches of this size; how many."""
        if (size, 1) not in self._launches:
            self._step(size, self._learn)
            learn = self._recorded(size)
            self._launches[size, 1] = self._launcher.record(lambda: self._step(size, learn))
            return 1
        if left < STEPS_PER_LAUNCH:
            self._launches[size, 1]()
            return 1
        if (size, STEPS_PER_LAUNCH) not in self._launches:
            learn = self._recordings[size].run if self._record else self._learn

            def several() -> None:
                for _ in range(STEPS_PER_LAUNCH):
                    self._step(size, learn)

            self._launches[size, STEPS_PER_LAUNCH] = self._launcher.record(several)
        self._launches[size, STEPS_PER_LAUNCH]()
        return STEPS_PER_LAUNCH

    def _step(self, size: int, learn: Learn) -> None:
        """The next step by the clock."""
        clock = self._clock
        torch.index_select(self._rates, 0, clock[2:], out=self._rate)
        learn(*self.batches.fetch(self._order, self._draws, clock[:2], size))
        if self.average is not None:
            self.average.update_parameters(self._model)
        clock.add_(self._advances[size])

    def _recorded(self, size: int) -> Learn:
        if self._record is None:
            return self._learn
        like = self.batches.fetch(self._order, self._draws, torch.zeros_like(self._clock[:2]), size)
        self._recordings[size] = self._record(*like)
        self._recordings[size].refresh()
        return self._recordings[size].run

    def _addresses(self) -> list[int]:
        """Where everything lies that a recording has the address of."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        if self.average is not None:
            tensors += [*self.average.parameters(), *self.average.buffers()]
        for state in self._optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return [tensor.data_ptr() for tensor in tensors]
