"""Epochs that run from the device: the plain loop's bits, recorded or not."""

import copy
import dataclasses
from contextlib import nullcontext

import pytest
import torch

from skinfast.models import build_model
from skinfast.nn import CrossEntropyLoss
from skinfast.optim import Adam
from skinfast.testing import devices
from skinfast.training import TrainConfig, TrainStep, graph, load_model, prepare, train
from skinfast.training.averaging import MovingAverage
from skinfast.training.capture import _Recording
from skinfast.training.graph import CudaGraphs
from skinfast.training.loop import deterministic_convolutions
from skinfast.training.schedule import learning_rate_schedule


class NoGraphs:
    """Stands in for CUDA graphs: a launch calls the function. Counts what is asked of it."""

    def __init__(self):
        self.recorded = self.launched = 0

    def active(self):
        return nullcontext()

    def record(self, function):
        self.recorded += 1

        def launch():
            self.launched += 1
            function()

        return launch


class Traces(NoGraphs):
    """Stands in for CUDA graphs with what they do: a launch repeats ops, with no Python between."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def record(self, function):
        changed = [*self.step.model.buffers(), *self.step._epochs.state()]
        before = [(tensor, tensor.clone()) for tensor in changed]
        replay, constants = _Recording(function, ()).function()
        for tensor, value in before:  # what reads nothing but such is computed meanwhile
            tensor.copy_(value)
        return super().record(torch.inference_mode()(lambda: replay(*constants)))


@pytest.fixture
def problem(small_data, monkeypatch):
    """86 images that train, in 10 batches of 8 and one of 6."""
    monkeypatch.setattr(graph, "STEPS_PER_LAUNCH", 4)
    config = TrainConfig(data=str(small_data), image_size=32, epochs=3, batch_size=8, device="cpu",
                         augment=True, rotate=True, color_jitter=0.1, lr_schedule="cosine",
                         warmup_epochs=0.5)  # fmt: skip
    return prepare(config)


class Run:
    """A model on its way, with all that a checkpoint holds."""

    def __init__(self, problem, device="cpu", ema=True, **options):
        config = problem.config
        torch.manual_seed(0)
        model = build_model(config.model, image_size=config.image_size).to(device)
        self.model = model
        self.optimizer = Adam(model.parameters(), lr=1e-2, weight_decay=0.01)
        self.batches = problem.train_batches()
        self.schedule = learning_rate_schedule(self.optimizer, config, len(self.batches))
        self.average = MovingAverage(model, 0.9) if ema else None
        self.step = TrainStep(
            model,
            self.optimizer,
            CrossEntropyLoss(label_smoothing=0.1).to(device),
            device=torch.device(device),
            precision=config.precision,
            **options,
        )
        self.totals = []

    def parts(self):
        parts = (self.model, self.optimizer, self.schedule, self.average)
        return [part for part in parts if part is not None]

    def epochs(self, *epochs):
        for epoch in epochs:
            self.model.train()
            self.batches.set_epoch(epoch)
            steps = []
            self.step.epoch(self.batches, self.schedule, self.average, steps.append)
            assert sum(steps) == len(self.batches)
            self.totals.append(self.step.take_totals())
            self.steps = steps
        return self

    def state(self):
        return copy.deepcopy([part.state_dict() for part in self.parts()])

    def load(self, state):
        for part, values in zip(self.parts(), state, strict=True):
            part.load_state_dict(copy.deepcopy(values))
        return self


def assert_same(one, other):
    """State dicts, compared to the bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one.cpu(), other.cpu())
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif not callable(one):
        assert one == other


CASES = [(model, precision) for model in ("cnn", "logistic-regression") for precision in
         ("float32", "bfloat16")]  # fmt: skip


@pytest.mark.parametrize(("model", "precision"), [*CASES, ("resnet50", "bfloat16")])
def test_steps_from_the_device_are_those_of_the_plain_loop(problem, model, precision):
    config = dataclasses.replace(problem.config, model=model, precision=precision)
    problem = dataclasses.replace(problem, config=config)
    epochs = (1, 2, 3)
    if model == "resnet50":
        problem = dataclasses.replace(problem, train_indices=problem.train_indices[:20])
        epochs = (1, 2)
    launcher = NoGraphs()
    plain = Run(problem).epochs(*epochs)
    ours = Run(problem, launcher=launcher).epochs(*epochs)
    assert_same(ours.state(), plain.state())
    assert ours.totals == plain.totals
    if model != "resnet50":
        # One step as it was and recorded, then four; the short batch as it was and recorded.
        assert launcher.recorded == 3
        assert ours.steps == [4, 4, 1, 1, 1]
        assert launcher.launched == 3 + 2 * len(ours.steps)


@pytest.mark.parametrize(("model", "precision"), CASES)
def test_no_launch_needs_the_host(problem, model, precision):
    config = dataclasses.replace(problem.config, model=model, precision=precision)
    problem = dataclasses.replace(problem, config=config)
    plain = Run(problem, ema=False).epochs(1, 2)
    ours = Run(problem, ema=False)
    ours.step._launcher = Traces(ours.step)
    ours.epochs(1, 2)
    assert ours.step._launcher.launched
    assert_same(ours.state(), plain.state())
    assert ours.totals == plain.totals


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_changes_between_epochs_is_followed(problem, precision):
    problem = dataclasses.replace(
        problem, config=dataclasses.replace(problem.config, precision=precision)
    )
    runs = [Run(problem), Run(problem, launcher=NoGraphs())]
    for run in runs:
        run.epochs(1)
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(0.9)
        run.epochs(2)
        run.load(run.state())  # another memory for the optimizer's state
        run.epochs(3)
    assert_same(runs[1].state(), runs[0].state())
    assert runs[1].step._launcher.recorded == 6


def test_a_resumed_run_ends_with_the_same_weights(problem):
    whole = Run(problem, launcher=NoGraphs()).epochs(1, 2, 3)
    state = Run(problem, launcher=NoGraphs()).epochs(1, 2).state()
    assert isinstance(state[1]["param_groups"][0]["lr"], float)
    resumed = Run(problem, launcher=NoGraphs()).load(state).epochs(3)
    assert_same(resumed.state(), whole.state())


def test_learning_rates_are_numbers_again_after_an_error(problem):
    run = Run(problem, launcher=NoGraphs())

    def interrupt(steps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.step.epoch(run.batches, progress=interrupt)
    assert isinstance(run.optimizer.param_groups[0]["lr"], float)


def on_gpu(problem, **settings):
    config = dataclasses.replace(problem.config, device="cuda", **settings)
    return dataclasses.replace(problem, config=config, device=torch.device("cuda"))


@pytest.mark.skipif("cuda" not in devices(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["cnn", "logistic-regression", "resnet50"])
@deterministic_convolutions()
def test_cuda_graphs_are_the_plain_loop_to_the_bit(problem, model, precision):
    problem = on_gpu(problem, model=model, precision=precision)
    plain = Run(problem, "cuda").epochs(1, 2, 3)
    ours = Run(problem, "cuda", capture=True)
    assert isinstance(ours.step._launcher, CudaGraphs)
    ours.epochs(1, 2, 3)
    assert_same(ours.state(), plain.state())
    assert ours.totals == plain.totals


@pytest.mark.skipif("cuda" not in devices(), reason="needs a GPU")
def test_a_resumed_run_on_a_gpu_ends_with_the_same_weights(problem, tmp_path):
    config = dataclasses.replace(problem.config, device="cuda", ema_decay=0.9)
    whole = train(config, tmp_path / "whole")

    class StopError(Exception):
        pass

    def stop(epoch):
        if epoch["epoch"] == 3:
            raise StopError

    with pytest.raises(StopError):
        train(config, tmp_path / "halves", on_epoch=stop)
    halves = train(config, tmp_path / "halves", resume=True)
    one, other = (load_model(run.model_file)[0].state_dict() for run in (whole, halves))
    assert_same(one, other)
