"""Gradients by depth: on networks whose gradients are known, and on the real ones."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from torch import nn

from skinfast import cli
from skinfast.data import SyntheticLesions
from skinfast.errors import SkinfastError
from skinfast.evaluation.gradient_flow import gradient_flow, measure
from skinfast.models import build_model
from skinfast.nn import LinearReLU
from skinfast.report.gradient_flow import summary, write_gradient_flow
from skinfast.training import TrainConfig, load_model, prepare, train
from tests.report.test_report import Page


class Chain(nn.Module):
    """Layers one after the other, with or without a shortcut around each: W = weight * identity."""

    def __init__(self, weight, shortcut, layers=6, width=4):
        super().__init__()
        self.layers = nn.Sequential(
            *(Step(width, weight, shortcut) for _ in range(layers)),
        )
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        return self.out(self.layers(x))


class Step(nn.Module):
    def __init__(self, width, weight, shortcut):
        super().__init__()
        self.fc = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.fc.weight).data.mul_(weight)
        self.shortcut = shortcut

    def forward(self, x):
        return self.fc(x) + x if self.shortcut else self.fc(x)


def watched(model, lr=0.1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return measure(model, optimizer, x, torch.arange(16) % 3)


@pytest.mark.parametrize(("shortcut", "factor"), [(False, 0.5), (True, 1.5)])
def test_gradients_shrink_and_grow_as_equations_12_and_15_say(shortcut, factor):
    # dE/dx at one layer is that of the next times W = 0.5 I (15), or times I + W (12).
    stream = watched(Chain(0.5, shortcut))["stream"]
    assert [point["depth"] for point in stream] == [1, 2, 3, 4, 5, 6, 7]
    assert [point["name"] for point in stream[:2]] == ["layers.0", "layers.1"]
    for here, there in itertools.pairwise(stream[:6]):
        assert here["gradient"] / there["gradient"] == pytest.approx(factor, rel=1e-5)


def test_gradient_is_that_of_each_image_s_own_loss_without_batch_norm():
    torch.manual_seed(0)
    model = Chain(0.5, True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, generator=generator)
    norms = []
    for image, label in zip(x, torch.arange(16) % 3, strict=True):
        hidden = model.layers(image[None]).detach().requires_grad_()
        nn.functional.cross_entropy(model.out(hidden), label[None]).backward()
        norms.append(hidden.grad.norm())
    measured = watched(model)["stream"][-2]
    assert measured["depth"] == 6
    assert measured["gradient"] == pytest.approx(float(torch.stack(norms).mean()), rel=1e-5)


def test_gradient_is_that_of_the_batch_s_summed_loss_with_batch_norm():
    torch.manual_seed(0)
    first, rest = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = nn.Sequential(first, rest, nn.Linear(4, 3))
    x, labels = torch.randn(16, 4), torch.arange(16) % 3
    hidden = first(x).detach().requires_grad_()
    nn.functional.cross_entropy(model[1:](hidden), labels, reduction="sum").backward()
    measured = measure(model, torch.optim.SGD(model.parameters(), lr=0.1), x, labels)
    assert [point["name"] for point in measured["stream"]] == ["0", "1.1", "2"]
    assert measured["stream"][0]["gradient"] == pytest.approx(
        float(hidden.grad.norm(dim=1).mean()), rel=1e-5
    )


def test_update_ratio_is_the_step_over_the_weights():
    for layer in watched(Chain(0.5, False), lr=0.25)["layers"]:
        assert layer["update_ratio"] == pytest.approx(
            0.25 * layer["gradient"] / layer["norm"], rel=1e-3
        )


def test_dead_units_are_those_that_are_zero_for_every_image():
    model = nn.Sequential(LinearReLU(4, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias[:6] = -1000.0
        model[0].bias[6:] = 1000.0
    (relu,) = watched(model)["relus"]
    assert (relu["dead_units"], relu["dead_channels"], relu["depth"]) == (0.75, 0.75, 1)


@pytest.mark.parametrize("backend", ["skinfast", "torch"])
def test_stages_of_the_cnn_are_layers_and_their_dead_channels_are_seen(backend):
    torch.manual_seed(0)
    model = build_model("cnn", image_size=64, backend=backend)
    with torch.no_grad():
        model.conv1.bias[:3] = -1000.0
        model.conv3.bias[:] = 1000.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    measured = measure(model, optimizer, torch.randn(8, 3, 64, 64), torch.arange(8) % 7)
    names = ["conv1", "conv2", "conv3", "fc1", "fc2", "fc3"]
    for part in ("stream", "layers"):
        assert [x["name"] for x in measured[part]] == names
        assert [x["depth"] for x in measured[part]] == [1, 2, 3, 4, 5, 6]
    assert [relu["name"] for relu in measured["relus"]] == names[:5]
    first, _, third, *_ = measured["relus"]
    assert first["dead_units"] == first["dead_channels"] == pytest.approx(0.3)
    assert third["dead_units"] == third["dead_channels"] == 0


@pytest.fixture
def few_lesions(monkeypatch):
    """120 synthetic lesions in place of 3,000."""
    monkeypatch.setattr(
        "skinfast.training.problem.SyntheticLesions",
        lambda image_size: SyntheticLesions(120, image_size),
    )


@pytest.fixture
def config():
    return TrainConfig(image_size=32, epochs=2, batch_size=16, device="cpu")


def test_measuring_leaves_training_as_it_is(few_lesions, config, tmp_path):
    """The networks are those of `skinfast train` after as many epochs."""
    problem = prepare(config)
    count = len(problem.train_indices)
    result = gradient_flow(config, ("cnn",), probe_images=count)
    losses = [m["loss"] for m in result["networks"][0]["measurements"]]
    run = train(config, tmp_path / "run")
    model, description = load_model(run.model_file)
    images = problem.dataset.images[problem.train_indices].permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (description.mean, description.std))
    labels = problem.dataset.labels[problem.train_indices]
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model((images - mean) / std), labels)
    assert losses[-1] == pytest.approx(float(loss), rel=1e-5)
    assert losses[0] > losses[-1]


def test_resnets_share_their_depths_and_shortcuts_count_for_none(few_lesions, config):
    config = dataclasses.replace(config, epochs=1)
    result = gradient_flow(
        config, ("resnet50", "resnet50-without-skips"), probe_images=16, train_images=16
    )
    resnet, plain = result["networks"]
    assert resnet["num_layers"] == plain["num_layers"] == 50
    for network, shortcuts in ((resnet, 4), (plain, 0)):
        first, last = network["measurements"]
        assert (first["epoch"], last["epoch"]) == (0, 1)
        assert [p["depth"] for p in first["stream"]] == [1, *range(4, 50, 3), 50]
        assert len(first["relus"]) == 49
        assert sum(layer["shortcut"] for layer in first["layers"]) == shortcuts
        assert first["loss"] != last["loss"]
    # What batch normalisation does without skip connections: gradients grow on the way back.
    ratios = [summary(network)[0]["ratio"] for network in (resnet, plain)]
    assert ratios[1] > 5 * ratios[0]


def test_two_measurements_are_equal(few_lesions, config):
    config = dataclasses.replace(config, epochs=1)
    first, second = (gradient_flow(config, ("cnn",), train_images=32) for _ in range(2))
    assert first == second


def test_page_and_files(few_lesions, config, tmp_path):
    result = gradient_flow(config, ("cnn",), probe_images=16)
    path = write_gradient_flow(result, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "gradient_flow.json").read_text()) == result
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in page.elements)
    assert len(page.all("svg")) == 4
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    words = page.words()
    for line in summary(result["networks"][0]):
        assert f"{line['epoch']} {line['loss']:.3f} {line['accuracy']:.3f}" in words
    svg = (tmp_path / "out" / "gradient_flow.svg").read_text()
    assert svg.startswith("<svg") and "xmlns=" in svg
    assert "var(--" not in svg and "currentColor" not in svg
    assert "before training" in svg and "after 2 epochs" in svg


def test_numbers_that_are_not_finite_are_null_and_not_drawn(few_lesions, config, tmp_path):
    result = gradient_flow(dataclasses.replace(config, epochs=1), ("cnn",), probe_images=16)
    last = result["networks"][0]["measurements"][-1]
    last["stream"][0]["gradient"] = math.inf
    last["layers"][0]["update_ratio"] = math.nan
    path = write_gradient_flow(result, tmp_path / "out")
    text = (tmp_path / "out" / "gradient_flow.json").read_text()
    written = json.loads(text, parse_constant=pytest.fail)["networks"][0]["measurements"][-1]
    assert written["stream"][0]["gradient"] is None
    assert written["layers"][0]["update_ratio"] is None
    assert written["stream"][1:] == last["stream"][1:]
    assert len(Page(path.read_text(encoding="utf-8")).all("svg")) == 4


def test_a_network_that_diverges_loses_nothing_that_was_measured(
    few_lesions, config, tmp_path, monkeypatch, capsys
):
    def diverge(model, *arguments):
        measured = measure(model, *arguments)
        calls.append(type(model).__name__)
        return {**measured, "loss": math.nan} if calls == ["ResNet", "ResNet"] else measured

    calls = []
    monkeypatch.setattr("skinfast.evaluation.gradient_flow.measure", diverge)
    arguments = ["gradient-flow", "--data", "synthetic", "--image-size", "32", "--epochs", "1",
                 "--model", "cnn", "resnet50-without-skips", "--train-images", "16",
                 "--probe-images", "8", "--device", "cpu", "--lr", "0.003", "--json",
                 "--output", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == (
        "the loss of resnet50-without-skips is not finite after epoch 1; lower --lr (it is 0.003)"
    )
    plain, cnn = json.loads(captured.out)["networks"]
    assert [m["epoch"] for m in plain["measurements"]] == [0] and plain["diverged_in_epoch"] == 1
    assert [m["epoch"] for m in cnn["measurements"]] == [0, 1] and cnn["diverged_in_epoch"] is None
    words = Page((tmp_path / "out" / "gradient_flow.html").read_text(encoding="utf-8")).words()
    assert "without skips, before training" in words and "CNN, after 1 epoch" in words
    assert "After epoch 1 its loss was not finite" in words


def test_command(few_lesions, tmp_path, capsys):
    arguments = ["gradient-flow", "--data", "synthetic", "--image-size", "32", "--epochs", "1",
                 "--model", "cnn", "--train-images", "32", "--probe-images", "8", "--device", "cpu",
                 "--output", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].endswith("gradient_flow.html")
    assert "cnn epoch 0: loss" in captured.err
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train_images"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--probe-images", "1"], "--probe-images is 1; it needs to be from 2 to 96"),
        (["--train-images", "97"], "--train-images is 97; it needs to be from 2 to 96"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--image-size", "16", "--model", "resnet50", "cnn"], "--image-size is 16, but the CNN's"),
        # Which are no demands of the other networks.
        (["--image-size", "16", "--model", "resnet50", "--probe-images", "1"], "--probe-images is"),
        (["--lr", "1e30"], "the loss of cnn is not finite after epoch 1; lower --lr"),
    ],
)
def test_bad_options(few_lesions, tmp_path, capsys, options, message):
    base = ["gradient-flow", "--data", "synthetic", "--image-size", "32", "--model", "cnn",
            "--device", "cpu", "--output", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(base + options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_network(few_lesions, config):
    with pytest.raises(SkinfastError, match="there is no network 'vgg'; choose among resnet50,"):
        gradient_flow(config, ("vgg",))


def test_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    arguments = ["gradient-flow", "--data", "synthetic", "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    assert "is a file" in capsys.readouterr().err
