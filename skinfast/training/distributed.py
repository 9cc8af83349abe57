"""Training in several processes: a part of every batch each, one run folder, one decision."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from skinfast import arena
from skinfast.data import CLASSES, DeviceBatches
from skinfast.environment import started_with_others
from skinfast.errors import SkinfastError
from skinfast.nn import FUSED_BATCH_NORMS
from skinfast.training.problem import choose_device
from skinfast.training.step import Totals, TrainStep, autocast, logits_of

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The processes that train a model together; a single one without ``torch.distributed``.

    The processes call the methods at the same places and in the same order.

    Attributes:
        rank: of this process, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Those of ``torch.distributed``'s default group, which has to take CPU tensors too."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.rank == 0

    def value_of_first(self, value: Result) -> Result:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def from_first(self, function: Callable[[], Result]) -> Result:
        """What ``function`` returns in the first process, the only one to call it."""
        return self.value_of_first(cast(Result, function() if self.is_first else None))

    def one_ahead(self, function: Callable[[], Result]) -> Result:
        """What ``function`` returns; one process of each machine calls it before the others."""
        waits = self.count > 1 and int(os.environ.get("LOCAL_RANK", self.rank)) > 0
        if waits:
            dist.all_reduce(torch.zeros(1))
        result = function()
        if self.count > 1 and not waits:
            dist.all_reduce(torch.zeros(1))
        return result

    def take_gpu(self, name: str) -> None:
        """Let "cuda" be another GPU for each process of a machine, if the device ``name`` is one.

        Raises:
            SkinfastError: a device that cannot be used, or fewer GPUs than processes.
        """
        device = choose_device(name)
        if self.count == 1 or device.type != "cuda":
            return
        if device.index is not None:
            raise SkinfastError(
                f"--device is {name}, but every process takes a GPU of its own; give cuda or cpu"
            )
        gpus = torch.cuda.device_count()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        if here > gpus:
            raise SkinfastError(
                f"{here} processes on a machine of {gpus} GPUs; give torchrun "
                f"--nproc-per-node={gpus}, or --device cpu"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)))

    def check_batch_size(self, batch_size: int, model: nn.Module) -> None:
        """Refuse batches of which a process would have too little.

        Raises:
            SkinfastError: they are smaller than the processes' smallest parts together.
        """
        least = self.count * smallest_part(model)
        if self.count > 1 and batch_size < least:
            raise SkinfastError(
                f"--batch-size is {batch_size}, of which {self.count} processes have a part each; "
                f"give at least {least}"
            )

    def take_buffers(self, model: nn.Module) -> None:
        """Replace the buffers, running means and variances, by those of the first process."""
        if self.count > 1:
            for buffers in arena.flat(model.buffers()):
                dist.broadcast(buffers, 0)

    def logits_of(
        self, model: nn.Module, batches: DeviceBatches, device: torch.device, precision: str
    ) -> Tensor:
        """What ``step.logits_of`` returns; the processes take the batches in turn."""
        if self.count == 1:
            return logits_of(model, batches, device, precision)
        logits = torch.zeros(len(batches.indices), len(CLASSES), device=device)
        for number, batch in enumerate(batches):
            if number % self.count == self.rank:
                rows = slice(number * batches.batch_size, (number + 1) * batches.batch_size)
                logits[rows] = logits_of(model, [batch], device, precision)
        dist.all_reduce(logits)
        return logits


class DistributedStep(TrainStep):
    """A ``TrainStep`` that is given the whole batch and learns from this process's part of it.

    The processes' gradients, each weighted by what the part counts for in the loss of the whole
    batch, are summed while the backward pass still runs (``DistributedDataParallel``). So they are
    those that one process would have, but for what a model with batch norm computes from its part
    alone. It is never captured: a replay would leave out the sum.
    """

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # From here on. It would send the first process's buffers at every step, where only an
        # evaluation reads them; `take_buffers` is in time for that. An argument of the same name
        # would leave them as they are now, too, and is called differently from release to release.
        replica.broadcast_buffers = False
        super().__init__(replica, *args, **{**options, "capture": False})
        self._processes = Processes.current()
        self._smallest_part = smallest_part(model)
        self._totals = _SharedTotals(self.device)

    def _learn(self, images: Tensor, labels: Tensor) -> None:
        rows = part_of(
            len(labels), self._processes.rank, self._processes.count, self._smallest_part
        )
        mine = labels[rows]
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            logits = self.model(images[rows])
            if len(mine):
                loss = self.loss_function(logits, mine) * self._share(labels, rows)
            else:
                loss = logits.sum()  # 0: takes part in the backward pass and changes nothing
        # The processes' mean is taken; the loss of the batch is their sum.
        (loss * self._processes.count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if len(mine):
            of_each = loss.detach() * (len(labels) / len(mine))
            self._totals.add(of_each, logits.detach(), mine)

    def _share(self, labels: Tensor, rows: slice) -> Tensor | float:
        """What these rows count for in the mean loss of the batch: all shares together are 1."""
        weight = getattr(self.loss_function, "weight", None)
        if weight is None:
            return len(labels[rows]) / len(labels)
        weights = weight[labels]
        return weights[rows].sum() / weights.sum()


class _SharedTotals(Totals):
    def take(self) -> tuple[float, float]:
        dist.all_reduce(self._sums)
        return super().take()


def part_of(images: int, rank: int, count: int, smallest: int = 1) -> slice:
    """The rows of a batch that a process takes.

    Together the parts are the batch, in its order. Their sizes differ by at most one, except that
    the last ones are empty where there are fewer than ``smallest`` images for each.
    """
    sharers = max(1, min(count, images // smallest))
    if rank >= sharers:
        return slice(images, images)
    return slice(rank * images // sharers, (rank + 1) * images // sharers)


def smallest_part(model: nn.Module) -> int:
    """The fewest images that a process can learn from: 2, if it normalises them by themselves."""
    return 2 if any(isinstance(module, FUSED_BATCH_NORMS) for module in model.modules()) else 1


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun started together with this one, if it did; leave at the end.

    Of an error that ends them all one process tells: in the others it becomes ``SystemExit``.

    Raises:
        SkinfastError: the others cannot be found, or one of them has ended without a word.
    """
    if not started_with_others():
        yield Processes()
        return
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    try:
        store, rank, count = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SkinfastError(
            f"the other processes cannot be found ({reason}); start all of them by torchrun "
            "--nproc-per-node=N -m skinfast train"
        ) from error
    try:
        yield Processes.current()
    except BaseException as error:
        if not _is_first_failure(store):
            raise SystemExit(2) from error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise SkinfastError(
                "another process of the training has ended, most likely for want of memory; lower "
                "--batch-size and go on with --resume"
            ) from error
        raise
    dist.destroy_process_group()


def _is_first_failure(store: dist.Store) -> bool:
    try:
        return store.add("failures", 1) == 1
    except RuntimeError:  # without torchrun the first process keeps the store: it has ended
        return False
