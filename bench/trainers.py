"""A model's training, as `skinfast train` does it and as a PyTorch user would write it.

Both hold the images on the device as uint8, and a step is whole: batch fetch, forward, loss,
backward, Adam, sums of loss and correct answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from skinfast import arena
from skinfast.models import build_model
from skinfast.nn import CrossEntropyLoss
from skinfast.optim import Adam
from skinfast.training import TrainStep
from skinfast.training.capture import CapturedStep, LowPrecisionCopies
from skinfast.training.loop import deterministic_convolutions
from skinfast.training.problem import Problem

Batch = tuple[Tensor, Tensor]


class Trainer:
    """Called, it makes the next step of an endless training."""

    model: nn.Module

    def __init__(self) -> None:
        epochs = (self.batches(epoch) for epoch in itertools.count(1))
        self._stream = itertools.chain.from_iterable(epochs)

    def __call__(self) -> None:
        self.step(*next(self._stream))

    def epoch(self) -> float:
        """One pass over the training set; its mean loss."""
        for batch in self.batches(1):
            self.step(*batch)
        return self.take_loss()

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Shuffled batches."""
        raise NotImplementedError

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Learn from one batch."""
        raise NotImplementedError

    def take_loss(self) -> float:
        """Mean loss since the last call."""
        raise NotImplementedError


class Skinfast(Trainer):
    """What skinfast.training.train does for an epoch."""

    def __init__(self, problem: Problem) -> None:
        config = problem.config
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, image_size=config.image_size).to(problem.device)
        arena.lay_out(self.model)
        self._step = TrainStep(
            self.model,
            Adam(self.model.parameters(), lr=config.lr),
            CrossEntropyLoss().to(problem.device),
            device=problem.device,
            precision=config.precision,
            capture=True,
        )
        self._batches = problem.train_batches(self.model)
        super().__init__()

    @deterministic_convolutions()
    def epoch(self) -> float:
        self._batches.set_epoch(self._batches.epoch + 1)
        self._step.epoch(self._batches)
        return self.take_loss()

    def batches(self, epoch: int) -> Iterator[Batch]:
        self._batches.set_epoch(epoch)
        return iter(self._batches)

    @deterministic_convolutions()
    def step(self, images: Tensor, labels: Tensor) -> None:
        self._step(images, labels)

    def take_loss(self) -> float:
        return self._step.take_totals()[0]


class PyTorch(Trainer):
    """The same in PyTorch alone.

    Args:
        layout: of model and images, "contiguous" or "channels_last".
        compiled: by torch.compile.
        fused: torch.optim.Adam(fused=True).
        compile_mode: torch.compile's on a GPU.
    """

    def __init__(
        self,
        problem: Problem,
        layout: str,
        compiled: bool,
        fused: bool,
        compile_mode: str = "max-autotune",
    ) -> None:
        config, device = problem.config, problem.device
        self.memory_format = {
            "contiguous": torch.contiguous_format,
            "channels_last": torch.channels_last,
        }[layout]
        torch.manual_seed(config.seed)
        model = build_model(config.model, image_size=config.image_size, backend="torch")
        self.model = model.to(device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self._forward: nn.Module = self.model
        if compiled:
            # Without it the models of earlier rows count as recompilations, of which few are made.
            torch._dynamo.reset()
            mode = compile_mode if device.type == "cuda" else None
            self._forward = torch.compile(self.model, mode=mode)  # type: ignore[assignment]
        self._loss_function = nn.CrossEntropyLoss()
        self._optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.lr, fused=True if fused else None
        )
        self._device, self._bfloat16 = device, config.precision == "bfloat16"
        self._batch_size = config.batch_size

        images = problem.dataset.images.permute(0, 3, 1, 2).to(device)
        self._images = images.contiguous(memory_format=self.memory_format)
        self._labels = problem.dataset.labels.to(device)
        self._train = torch.from_numpy(np.asarray(problem.train_indices))
        # pixel * scale + shift = (pixel / 255 - mean) / std
        mean, std = (
            torch.tensor(v, device=device).view(3, 1, 1) for v in (problem.mean, problem.std)
        )
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self._sums = torch.zeros(3, device=device)
        super().__init__()

    def fetch(self, index: Tensor) -> Batch:
        """The batch of images and labels with these indices."""
        images = self._images.index_select(0, index).float().mul_(self._scale).add_(self._shift)
        return images, self._labels.index_select(0, index)

    def batches(self, epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(self._train), generator=generator)
        for index in self._train[order].to(self._device).split(self._batch_size):
            yield self.fetch(index)

    def step(self, images: Tensor, labels: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
            logits = self._forward(images)
            loss = self._loss_function(logits, labels)
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            self._sums[0] += loss * len(labels)
            self._sums[1] += (logits.argmax(1) == labels).sum()
            self._sums[2] += len(labels)

    def take_loss(self) -> float:
        loss, _, count = self._sums.tolist()
        self._sums.zero_()
        return loss / count


class PyTorchGraph(PyTorch):
    """A step of PyTorch's, fetch to Adam, captured in a CUDA graph as its documentation shows.

    An epoch is for full batches only, those that the graph has the shape of.
    """

    def __init__(self, problem: Problem, layout: str) -> None:
        super().__init__(problem, layout, compiled=False, fused=True)
        self._optimizer = torch.optim.Adam(
            self.model.parameters(), lr=problem.config.lr, fused=True, capturable=True
        )
        size = problem.config.batch_size
        self._index = torch.arange(size, device=problem.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def epoch(self) -> float:
        generator = torch.Generator().manual_seed(1)
        order = self._train[torch.randperm(len(self._train), generator=generator)]
        for index in order.to(self._device).split(self._batch_size):
            self._index.copy_(index)
            if self._graph is None:
                self._capture()
            else:
                self._graph.replay()
        return self.take_loss()

    def _capture(self) -> None:
        """Make a step as it is, and record the next ones."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self.step(*self.fetch(self._index))
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.step(*self.fetch(self._index))


class Update:
    """The update phase alone: what a step does with weights and gradients besides using them.

    Weights are converted for the forward pass and fixed gradients back where the precision asks for
    it, Adam steps, the gradients are cleared. Ours is captured, as in training on a CPU.
    """

    def __init__(self, problem: Problem, ours: bool, fused: bool) -> None:
        torch.manual_seed(problem.config.seed)
        model = build_model(problem.config.model, image_size=problem.config.image_size)
        self.parameters = list(model.to(problem.device).parameters())
        # What autocast converts: the weights of convolutions and dense layers.
        bfloat16 = problem.config.precision == "bfloat16"
        self._dtypes = [
            torch.bfloat16 if bfloat16 and p.dim() > 1 else p.dtype for p in self.parameters
        ]
        self._grads = [
            torch.randn_like(p).to(dtype)
            for p, dtype in zip(self.parameters, self._dtypes, strict=True)
        ]
        self._call = partial(self._update, *self._grads)
        if not ours:
            self._optimizer: torch.optim.Optimizer = torch.optim.Adam(
                self.parameters, fused=True if fused else None
            )
            return
        self._optimizer = adam = Adam(self.parameters)
        if problem.device.type == "cpu":
            adam.make_states()
            captured = CapturedStep(self._update, self._grads, adam, LowPrecisionCopies())
            self._call = partial(captured.replay, *self._grads)

    def __call__(self) -> None:
        self._call()

    def _update(self, *grads: Tensor) -> None:
        self.lowered = [
            parameter.detach().to(dtype)
            for parameter, dtype in zip(self.parameters, self._dtypes, strict=True)
        ]
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad.to(parameter.dtype)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def assert_same_updates(updates: dict[str, Update]) -> None:
    """Three steps of each lead to the same parameters."""
    first, *others = updates.values()
    for update in (first, *others):
        for _ in range(3):
            update()
    for other in others:
        for ours, theirs in zip(first.parameters, other.parameters, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def assert_same_training(problem: Problem, tolerance: float, trainers: dict[str, Trainer]) -> None:
    """From equal weights, the same three batches give the same losses."""
    batches = list(itertools.islice(iter(problem.train_batches()), 3))
    losses: dict[str, list[float]] = {}
    for name, trainer in trainers.items():
        if isinstance(trainer, PyTorch):
            _assert_same_fetch(problem, trainer)
        losses[name] = []
        for images, labels in batches:
            if isinstance(trainer, PyTorch):  # in the layout that it will be timed in
                images = images.contiguous(memory_format=trainer.memory_format)
            trainer.step(images, labels)
            losses[name].append(trainer.take_loss())
    first, *others = losses.items()
    for name, values in others:
        for step, (ours, theirs) in enumerate(zip(first[1], values, strict=True), start=1):
            assert abs(ours - theirs) <= tolerance * abs(theirs), (
                f"the loss of step {step} is {ours:.5f} with {first[0]}, {theirs:.5f} with {name}"
            )


def _assert_same_fetch(problem: Problem, trainer: PyTorch) -> None:
    images, labels = next(iter(problem.test_batches()))
    index = torch.from_numpy(np.asarray(problem.split.test[: len(labels)])).to(images.device)
    fetched, fetched_labels = trainer.fetch(index)
    # A last digit that differs may be rounded to another bfloat16.
    rtol = 1e-4 if images.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(fetched, images.float(), rtol=rtol, atol=1e-5)
    assert torch.equal(fetched_labels, labels), "the labels fetched differ"
