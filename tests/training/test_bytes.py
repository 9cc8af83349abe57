"""Logistic regression trained on pixels as bytes: the training on floats, to rounding."""

import copy
import dataclasses

import pytest
import torch

from skinfast.models import build_model
from skinfast.nn import CrossEntropyLoss, convert_sync_batch_norm
from skinfast.optim import Adam
from skinfast.training import TrainConfig, TrainStep, load_model, prepare, train
from skinfast.training.problem import Problem

PRECISIONS = ("float32", "bfloat16")


@pytest.fixture
def problem(small_data):
    return prepare(
        TrainConfig(data=str(small_data), model="logistic-regression", image_size=32, epochs=2,
                    batch_size=16, lr=1e-3, device="cpu", augment=True, rotate=True)
    )  # fmt: skip


def with_settings(problem, **settings):
    return dataclasses.replace(problem, config=dataclasses.replace(problem.config, **settings))


def model_of(problem):
    torch.manual_seed(0)
    config = problem.config
    return build_model(config.model, image_size=config.image_size, backend=config.backend)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.uint8),
        ({"precision": "bfloat16"}, torch.uint8),
        ({"balanced_batches": True}, torch.uint8),
        ({"color_jitter": 0.1}, torch.float32),
        ({"backend": "torch"}, torch.float32),
        ({"model": "cnn"}, torch.float32),
        ({"model": "cnn", "precision": "bfloat16"}, torch.bfloat16),
    ],
)
def test_who_is_fed_bytes(problem, settings, dtype):
    problem = with_settings(problem, **settings)
    model = model_of(problem)
    images, _ = next(iter(problem.train_batches(model)))
    assert images.dtype == dtype and images.is_contiguous()
    with torch.autocast("cpu", torch.bfloat16, enabled=problem.config.precision == "bfloat16"):
        assert torch.isfinite(model(images)).all()
    for batches in (problem.train_batches(), problem.test_batches()):
        assert next(iter(batches))[0].is_floating_point()


def test_synchronised_statistics_are_of_floats(problem):
    model = convert_sync_batch_norm(model_of(problem), "cpu")
    images, _ = next(iter(problem.train_batches(model)))
    assert images.dtype == torch.float32


def test_bytes_mean_nothing_to_a_model_that_was_not_told(problem):
    batches = problem.train_batches(model_of(problem))
    with pytest.raises(RuntimeError, match="x has dtype uint8; it needs scale and shift"):
        model_of(problem)(next(iter(batches))[0])


def step_on(model, precision, capture):
    return TrainStep(
        model,
        Adam(model.parameters(), lr=1e-3, weight_decay=0.01),
        CrossEntropyLoss(label_smoothing=0.1),
        device=torch.device("cpu"),
        precision=precision,
        capture=capture,
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_recorded_step_is_the_eager_one_bit_for_bit(problem, precision):
    problem = with_settings(problem, precision=precision)
    model = model_of(problem)
    batches = list(problem.train_batches(model))
    assert {images.dtype for images, _ in batches} == {torch.uint8}
    steps = [step_on(copy.deepcopy(model), precision, capture) for capture in (False, True)]
    for step in steps:
        for images, labels in batches:
            step(images, labels)
    eager, recorded = steps
    assert any(recorded._captured.values())
    for name, value in eager.model.state_dict().items():
        assert torch.equal(recorded.model.state_dict()[name], value), name
    assert recorded.take_totals() == eager.take_totals()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_recorded_steps_on_bytes_are_those_on_floats(problem, precision):
    """Without Adam's division, which takes a gradient that is rounding for a whole step."""
    problem = with_settings(problem, precision=precision)
    model = model_of(problem)
    feeds = {"bytes": problem.train_batches(model), "floats": problem.train_batches()}
    results = {}
    for name, batches in feeds.items():
        step = step_on(copy.deepcopy(model), precision, capture=True)
        for group in step.optimizer.param_groups:
            group["eps"] = 1.0
        for images, labels in batches:
            step(images, labels)
        assert any(step._captured.values())
        results[name] = {**step.model.state_dict(), "totals": torch.tensor(step.take_totals())}
    start = model.state_dict()
    # The logits of either are rounded to autocast's dtype; some fall on either side.
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[precision]
    for name, value in results["floats"].items():
        moved = value - start[name] if name in start else value
        difference = results["bytes"][name] - value
        assert difference.abs().max() <= tolerance * moved.abs().max() + 1e-7, name


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9}, {"batch_size": 23}], ids=str)
def test_runs_follow_the_curve_of_floats(problem, tmp_path, monkeypatch, settings):
    problem = with_settings(problem, **settings)
    runs = [train(problem.config, tmp_path / "bytes", problem=problem)]
    monkeypatch.setattr(Problem, "_reader_of_bytes", lambda *_: None)
    runs.append(train(problem.config, tmp_path / "floats", problem=problem))
    ours, theirs = (run.read_metrics(2) for run in runs)
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("train_loss", "test_loss"):
            assert mine[key] == pytest.approx(other[key], rel=1e-3), key
    states = [load_model(run.model_file)[0].state_dict() for run in runs]
    for name in ("norm.running_mean", "norm.running_var"):  # which no weight has a say in
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-5, atol=1e-5)
