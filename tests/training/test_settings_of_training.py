"""Schedules, moving averages, early stopping, focal loss, presets: what they are, and resuming."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from skinfast.data import BalancedBatches
from skinfast.errors import SkinfastError
from skinfast.models import build_model
from skinfast.training import PRESETS, TrainConfig, load_model, prepare, preset, train
from skinfast.training.averaging import MovingAverage
from skinfast.training.early_stopping import BestEpoch
from skinfast.training.losses import FocalLoss, loss_function
from skinfast.training.schedule import learning_rate_schedule


@pytest.fixture
def config(small_data):
    return TrainConfig(data=str(small_data), image_size=32, epochs=4, batch_size=16, device="cpu")


def assert_same_weights(first, second):
    one, other = (load_model(run.model_file)[0].state_dict() for run in (first, second))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# --- resuming -------------------------------------------------------------------------------------

EVERYTHING = {"rotate": True, "color_jitter": 0.2, "augment": True, "balanced_batches": True}


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_schedule": "cosine"},
        {"lr_schedule": "cosine", "warmup_epochs": 1.5},
        {"lr_schedule": "one-cycle"},
        {"lr_schedule": "step", "lr_step_epochs": 1, "warmup_epochs": 0.5},
        {"warmup_epochs": 2.5},
        {"ema_decay": 0.9, "model": "logistic-regression"},
        {"validation_fraction": 0.2},
        {"validation_fraction": 0.2, "patience": 1, "split": "lesion", "lr": 0.1},
        {"loss": "focal", "class_weights": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        EVERYTHING,
        {**EVERYTHING, "lr_schedule": "one-cycle", "ema_decay": 0.99, "validation_fraction": 0.2},
    ],
    ids=lambda settings: "-".join(settings),
)  # fmt: skip
def test_resumed_run_equals_an_uninterrupted_one(config, tmp_path, settings):
    config = dataclasses.replace(config, **settings)
    whole = train(config, tmp_path / "whole")

    class StopError(Exception):
        pass

    def stop(epoch):
        if epoch["epoch"] == 3:
            raise StopError

    try:
        train(config, tmp_path / "halves", on_epoch=stop)
    except StopError:
        pass
    else:
        assert config.patience  # it stopped before by itself
    halves = train(config, tmp_path / "halves", resume=True)
    assert_same_weights(whole, halves)
    lines = [run.read_metrics(4) for run in (whole, halves)]
    for ours in lines:
        for line in ours:
            del line["seconds"], line["images_per_second"]
    assert lines[0] == lines[1]


def test_more_epochs_are_refused_where_the_schedule_was_laid_out_for_fewer(config):
    with pytest.raises(SkinfastError, match="--lr-schedule cosine was laid out for 4 epochs"):
        dataclasses.replace(config, lr_schedule="cosine").continued_by({"epochs": 5})
    assert dataclasses.replace(config, lr_schedule="step").continued_by({"epochs": 5}).epochs == 5


# --- learning rate --------------------------------------------------------------------------------


def rates(steps=40, epochs=4, **settings):
    """The learning rate of every step of epochs of equally many steps."""
    config = TrainConfig(epochs=epochs, lr=1.0, **settings)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = learning_rate_schedule(optimizer, config, steps // epochs)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return np.array(seen)


def test_schedules_follow_their_formulas():
    step = np.arange(40)
    np.testing.assert_array_equal(rates(), np.ones(40))
    np.testing.assert_allclose(
        rates(lr_schedule="cosine"), (1 + np.cos(np.pi * step / 40)) / 2, atol=1e-12
    )
    np.testing.assert_allclose(
        rates(lr_schedule="step", lr_step_epochs=2, lr_step_factor=0.5),
        np.where(step < 20, 1.0, 0.5),
    )
    cycle = rates(lr_schedule="one-cycle", warmup_epochs=1)
    assert cycle.argmax() in (9, 10) and cycle.max() > 0.98
    assert cycle[0] == pytest.approx(1 / 25) and cycle[-1] < 1e-3
    assert (np.diff(cycle[10:]) < 0).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40])
def test_one_cycle_has_a_rate_for_every_length_of_its_rise(steps):
    for rise in range(steps + 1):
        # Below one epoch, as it must be; the last of them rounds to all steps.
        warmup = min(rise, steps - 0.1) / steps
        seen = rates(steps, epochs=1, lr_schedule="one-cycle", warmup_epochs=warmup)
        assert ((seen > 0) & (seen <= 1)).all()
        assert seen[-1] == pytest.approx(1 / 250_000)
        if rise and steps > 1:
            assert seen[0] == pytest.approx(1 / 25)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_warmup_rises_linearly_and_then_the_schedule_begins(schedule):
    seen = rates(lr_schedule=schedule, warmup_epochs=1)
    np.testing.assert_allclose(seen[:10], 0.01 + 0.99 * np.arange(10) / 10, atol=1e-12)
    assert seen[10] == pytest.approx(1.0)
    if schedule == "cosine":
        half = (1 + np.cos(np.pi * np.arange(30) / 30)) / 2
        np.testing.assert_allclose(seen[10:], half, atol=1e-12)


def test_the_rate_of_every_epoch_is_recorded(config, tmp_path):
    run = train(dataclasses.replace(config, lr_schedule="step", lr_step_epochs=1), tmp_path / "run")
    seen = [line["learning_rate"] for line in run.read_metrics(4)]
    assert seen == pytest.approx([1e-3, 1e-4, 1e-5, 1e-6])


# --- moving average -------------------------------------------------------------------------------


def test_moving_average_is_its_formula_for_weights_and_statistics():
    torch.manual_seed(0)
    model = build_model("logistic-regression", image_size=8)
    average = MovingAverage(model, 0.5)
    expected = {}
    for t in range(6):
        model(torch.randn(4, 3, 8, 8) + t)  # moves the running statistics and counts batches
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update_parameters(model)
        decay = min(0.5, (1 + t) / (10 + t)) if t else 0.0
        for name, now in model.state_dict().items():
            before = expected.get(name, now.double())
            expected[name] = decay * before + (1 - decay) * now.double()
    for name, value in average.module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert int(value) == 6
        else:
            torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-5)


def test_the_average_is_what_is_measured_and_kept(config, tmp_path):
    config = dataclasses.replace(config, epochs=2, lr=0.01, model="logistic-regression")
    plain = train(config, tmp_path / "plain")
    averaged = train(dataclasses.replace(config, ema_decay=0.9), tmp_path / "averaged")
    one, other = (run.read_metrics(2) for run in (plain, averaged))
    assert [e["train_loss"] for e in one] == [e["train_loss"] for e in other]
    assert [e["test_loss"] for e in one] != [e["test_loss"] for e in other]
    state = averaged.load_checkpoint(
        dataclasses.replace(config, ema_decay=0.9), prepare(config).fingerprint()
    )
    kept = load_model(averaged.model_file)[0].state_dict()
    assert torch.equal(kept["fc.weight"], state["average"]["module.fc.weight"])
    assert not torch.equal(kept["fc.weight"], state["model"]["fc.weight"])


# --- early stopping -------------------------------------------------------------------------------


def test_best_epoch_keeps_a_copy_of_the_first_best_and_stops_in_time():
    model = nn.Linear(1, 1)
    best = BestEpoch(patience=2)
    for epoch, score in enumerate([0.2, 0.5, 0.5, 0.4], start=1):
        with torch.no_grad():
            model.weight.fill_(epoch)
        assert not best.should_stop(epoch - 1)
        best.see(epoch, score, model)
    assert best.should_stop(4) and not BestEpoch(0).should_stop(10**6)
    assert best.epoch == 2 and best.weights["weight"].item() == 2


def test_run_stops_early_and_keeps_the_weights_of_its_best_epoch(config, tmp_path, monkeypatch):
    scores = iter([0.3, 0.6, 0.5, 0.4, 0.9, 0.9])
    monkeypatch.setattr("skinfast.training.loop._validate", lambda *_: next(scores))
    config = dataclasses.replace(config, epochs=6, validation_fraction=0.2, patience=2)
    run = train(config, tmp_path / "run")
    lines = run.read_metrics(6)
    assert [line["validation_balanced_accuracy"] for line in lines] == [0.3, 0.6, 0.5, 0.4]
    monkeypatch.setattr("skinfast.training.loop._validate", lambda *_: 0.5)
    shorter = train(dataclasses.replace(config, epochs=2, patience=0), tmp_path / "shorter")
    one, other = (
        run.load_checkpoint(config, prepare(config).fingerprint()) for run in (run, shorter)
    )
    kept = load_model(run.model_file)[0].state_dict()
    assert torch.equal(kept["fc1.weight"], other["model"]["fc1.weight"])  # of epoch 2
    assert not torch.equal(kept["fc1.weight"], one["model"]["fc1.weight"])  # not of epoch 4
    # Resumed, it stays stopped.
    assert len(train(config, tmp_path / "run", resume=True).read_metrics(6)) == 4


@pytest.mark.parametrize("split", ["image", "lesion"])
def test_validation_part_is_of_the_training_images_alone(config, split):
    plain = prepare(dataclasses.replace(config, split=split))
    problem = prepare(dataclasses.replace(config, split=split, validation_fraction=0.25))
    train, validation = set(problem.train_indices), set(problem.validation_indices)
    assert train | validation == set(plain.train_indices) and not train & validation
    assert np.array_equal(problem.split.test, plain.split.test)
    assert len(validation) == pytest.approx(0.25 * len(plain.train_indices), abs=3)
    assert problem.mean != plain.mean  # of the images that train


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_its_formula(weighted, gamma):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(50, 7), torch.randint(7, (50,))
    weight = torch.rand(7) + 0.1 if weighted else None
    p = torch.softmax(logits.double(), 1)[torch.arange(50), labels]
    w = weight.double()[labels] if weighted else torch.ones(50, dtype=torch.float64)
    expected = (w * (1 - p) ** gamma * -p.log()).sum() / w.sum()
    got = FocalLoss(gamma, weight)(logits, labels)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)
    if gamma == 0:
        torch.testing.assert_close(got, nn.functional.cross_entropy(logits, labels, weight))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_of_certain_answers_has_a_finite_gradient(gamma):
    logits = torch.tensor([[200.0, 0.0], [200.0, 0.0]], requires_grad=True)
    FocalLoss(gamma)(logits, torch.tensor([0, 1])).backward()
    assert logits.grad.isfinite().all()


def test_loss_function_is_the_one_that_was_asked_for():
    weight = torch.rand(7)
    focal = loss_function(TrainConfig(loss="focal", focal_gamma=3.0), weight)
    assert isinstance(focal, FocalLoss) and focal.gamma == 3.0
    smooth = loss_function(TrainConfig(label_smoothing=0.2), None)
    assert isinstance(smooth, nn.CrossEntropyLoss) and smooth.label_smoothing == 0.2


# --- balanced batches -----------------------------------------------------------------------------


def test_balanced_batches_hold_every_class_equally_often(config):
    problem = prepare(dataclasses.replace(config, balanced_batches=True, batch_size=21))
    batches = problem.train_batches()
    assert isinstance(batches, BalancedBatches)
    orders = []
    for epoch in (1, 2):
        batches.set_epoch(epoch)
        labels = [batch for _, batch in batches]
        assert sum(map(len, labels)) == len(problem.train_indices)
        for batch in labels:
            counts = torch.bincount(batch, minlength=7)
            assert counts.max() - counts.min() <= 2
        order, _ = batches.draw()
        uses = np.bincount(order.numpy(), minlength=len(problem.dataset))
        assert set(np.flatnonzero(uses)) <= set(problem.train_indices)
        for label in range(7):  # a class's images take turns
            of_class = uses[np.intersect1d(
                problem.train_indices, np.flatnonzero(problem.dataset.labels == label)
            )]  # fmt: skip
            assert of_class.max() - of_class.min() <= 1
        orders.append(order)
    assert not torch.equal(*orders)
    assert torch.equal(orders[1], batches.draw()[0])


# --- presets and settings that contradict each other ----------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", ["resnet50", "cnn", "logistic-regression"])
def test_presets_are_settings_of_a_run(name, model):
    config = TrainConfig(**preset(name, model))
    assert config.model == model
    if name == "paper":
        assert (config.beta1, config.beta2, config.eps) == (0.9, 0.99, 1e-8)
        assert config.lr == (0.01 if model == "resnet50" else 0.001)
        assert config.epochs == {"cnn": 200, "resnet50": 20}.get(model, config.epochs)
        assert config.split == "image" and not config.validation_fraction


def test_preset_that_is_not_there():
    with pytest.raises(SkinfastError, match="no preset 'bad'; choose one of paper, best"):
        preset("bad", "cnn")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 3}, "--patience needs a validation part"),
        ({"validation_fraction": 0.3, "split": "lesion"}, "by lesion it needs to be 1/k"),
        ({"validation_fraction": 1.0}, "--validation-fraction is 1.0"),
        ({"fold": 1}, "--folds and --fold are of a split by lesion"),
        ({"fold": 5, "split": "lesion"}, "--fold is 5; it needs to be from 0 to below --folds"),
        ({"loss": "focal", "label_smoothing": 0.1}, "is of the cross-entropy loss"),
        ({"balanced_batches": True, "sampling": "over"}, "both even out the classes"),
        ({"balanced_batches": True, "class_weights": True}, "correct for the classes twice; choos"),
        ({"warmup_epochs": 30.0}, "--warmup-epochs is 30.0; it needs to be from 0 to below"),
        ({"ema_decay": 1.0}, "--ema-decay is 1.0"),
        ({"color_jitter": math.nan}, "--color-jitter is nan"),
        ({"lr_schedule": "linear"}, "--lr-schedule is 'linear'; choose one of constant, cosine"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(SkinfastError, match=message):
        TrainConfig(**settings)


# --- every setting reaches the training -----------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "instead_of"),
    [
        ({"augment": True}, {}),
        ({"rotate": True}, {}),
        ({"color_jitter": 0.2}, {}),
        ({"label_smoothing": 0.1}, {}),
        ({"loss": "focal"}, {}),
        ({"loss": "focal", "focal_gamma": 1.0}, {"loss": "focal"}),
        ({"class_weights": True}, {}),
        ({"loss": "focal", "class_weights": True}, {"loss": "focal"}),
        ({"balanced_batches": True}, {}),
        ({"weight_decay": 0.5}, {}),
        ({"weight_decay": 0.5, "decoupled_weight_decay": True}, {"weight_decay": 0.5}),
        ({"lr_schedule": "one-cycle"}, {"lr_schedule": "cosine"}),
        ({"warmup_epochs": 1.0}, {}),
        ({"validation_fraction": 0.2}, {}),
        ({"split": "lesion", "fold": 1}, {"split": "lesion"}),
        ({"split": "lesion", "folds": 4}, {"split": "lesion"}),
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_setting_changes_the_training(config, tmp_path, settings, instead_of):
    config = dataclasses.replace(config, epochs=2, lr=0.01, model="logistic-regression")
    losses = [
        train(dataclasses.replace(config, **changes), tmp_path / name).read_metrics(2)[1][
            "train_loss"
        ]
        for name, changes in (("one", settings), ("other", instead_of))
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)
