"""Grad-CAM against its formula, on planted evidence, and the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from skinfast import cli
from skinfast.data import CLASSES
from skinfast.errors import SkinfastError
from skinfast.evaluation import predict
from skinfast.evaluation.explain import explain, grad_cam
from skinfast.evaluation.temperature import checksum
from skinfast.models import build_model, resnet50
from skinfast.report.explain import overlay, place, write_explanations
from skinfast.training import save_model
from skinfast.training.model_file import ModelDescription
from tests.report.test_report import Page


@pytest.mark.parametrize("backend", ["skinfast", "torch"])
def test_after_average_pooling_the_weights_are_those_of_the_dense_layer(backend):
    """For logits w . mean(A) the gradient is w / (h w): ResNet-50's layer4 (Zhou et al.'s CAM)."""
    torch.manual_seed(0)
    model = resnet50(image_size=128, backend=backend).eval()
    image = torch.randn(1, 3, 128, 128)
    kept = []
    model.layer4.register_forward_hook(lambda m, i, output: kept.append(output.detach()))
    with_heat = 0
    for asked in range(7):
        heat, label, logits, layer = grad_cam(model, image, asked)
        assert (label, layer, heat.shape) == (asked, "layer4", (4, 4))
        assert torch.equal(logits.float(), model(image)[0].detach())
        expected = torch.relu((model.fc.weight[asked, :, None, None] * kept[0][0]).sum(0)).detach()
        with_heat += bool(expected.max() > 0)
        expected = expected / expected.max() if expected.max() > 0 else expected
        torch.testing.assert_close(torch.from_numpy(heat), expected)
    assert with_heat >= 2


@pytest.mark.parametrize("backend", ["skinfast", "torch"])
@pytest.mark.parametrize(("model", "side"), [("resnet50", 64), ("cnn", 64), ("cnn", 32)])
def test_equals_finite_differences(model, side, backend):
    """The mean gradient of a map is how the logit follows when the whole map is raised."""
    torch.manual_seed(0)
    model = build_model(model, image_size=side, backend=backend).double().eval()
    image = torch.randn(1, 3, side, side, dtype=torch.float64)
    heat, label, _, layer = grad_cam(model, image)
    assert heat.max() == 1
    maps, raised = [], {}

    def hook(module, inputs, output):
        maps.append(output)
        if not raised:
            return output
        return output + raised["by"] * nn.functional.one_hot(
            torch.tensor(raised["channel"]), output.shape[1]
        ).view(1, -1, 1, 1)

    getattr(model, layer).register_forward_hook(hook)
    with torch.no_grad():
        base = float(model(image)[0, label])
        a = maps[0][0]
        assert min(a.shape[1:]) >= 4 and a.shape[1:] == heat.shape
        weights = []
        for channel in range(len(a)) if len(a) <= 10 else range(0, len(a), 200):
            raised.update(channel=channel, by=1e-7)
            weights.append((float(model(image)[0, label]) - base) / 1e-7 / heat.size)
    if len(a) > 10:  # too many to raise them all: the gradient itself is compared
        x = maps[0].detach().requires_grad_()
        raised.clear()
        replace = getattr(model, layer).register_forward_hook(lambda m, i, o: x)
        (gradient,) = torch.autograd.grad(model(image)[0, label], x)
        replace.remove()
        exact = gradient.mean((2, 3))[0]
        torch.testing.assert_close(
            torch.tensor(weights, dtype=torch.float64), exact[::200], rtol=1e-4, atol=1e-7
        )
        weights = exact.tolist()
    expected = torch.relu((torch.tensor(weights)[:, None, None] * a).sum(0))
    np.testing.assert_allclose(heat, expected / expected.max(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("side", "layer", "maps"), [(32, "conv2", 5), (64, "conv2", 10), (128, "conv3", 5)]
)
@pytest.mark.parametrize("backend", ["skinfast", "torch"])
def test_the_deepest_stage_of_the_cnn_with_maps_of_4x4_is_looked_at(backend, side, layer, maps):
    model = build_model("cnn", image_size=side, backend=backend).eval()
    heat, _, _, used = grad_cam(model, torch.randn(1, 3, side, side))
    assert (used, heat.shape) == (layer, (maps, maps))


class Bright(nn.Module):
    """Class 1 is brightness anywhere, class 0 its absence."""

    def __init__(self):
        super().__init__()
        self.maps = nn.AvgPool2d(8)

    def forward(self, x):
        total = self.maps(x).sum((1, 2, 3))
        return torch.stack([-total, total], dim=1)


def test_heat_is_where_the_evidence_is():
    image = torch.zeros(1, 3, 64, 64, requires_grad=True)
    with torch.no_grad():
        image[:, :, 48:56, 8:16] = 1
    heat, label, _, _ = grad_cam(Bright(), image)
    assert label == 1
    assert heat[6, 1] == 1 and heat.sum() == 1
    assert place(heat) == "at the lower left"
    against, _, _, _ = grad_cam(Bright(), image, 0)
    assert against.max() == 0 and place(against) == "nowhere"


def test_place_in_words():
    for position, words in {
        (0, 0): "at the upper left",
        (1, 1): "in the middle",
        (2, 1): "at the lower middle",
        (1, 2): "at the middle right",
    }.items():
        heat = np.zeros((3, 3), np.float32)
        heat[position] = 1
        assert place(heat) == words


def test_overlay_leaves_cold_places_as_they_are():
    pixels = np.full((32, 32, 3), 100, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 1
    picture = overlay(pixels, heat)
    assert picture.shape == (256, 256, 3)
    assert (picture[128:] == 100).all()
    assert picture[0, 0, 0] > 180  # yellow


def write_run(folder, model, side):
    torch.manual_seed(0)
    folder.mkdir()
    description = ModelDescription(model, side, CLASSES, (0.5,) * 3, (0.2,) * 3)
    save_model(
        folder / "model.safetensors", build_model(model, image_size=side).eval(), description
    )
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", "cnn", 32)


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for k in range(2):
        pixels = np.random.default_rng(k).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        paths.append(tmp_path / f"lesion{k}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_probabilities_are_those_of_predict(run, pictures):
    for one, prediction in zip(explain(run, pictures), predict(run, pictures), strict=True):
        assert one.class_name == one.predicted == prediction["class"]
        assert one.probability == pytest.approx(prediction["probability"], rel=1e-5)
    (other,) = explain(run, pictures[:1], class_name="vasc")
    assert other.class_name == "vasc"
    vasc = predict(run, pictures[:1])[0]["probabilities"]["vasc"]
    assert other.probability == pytest.approx(vasc, rel=1e-5)


@pytest.mark.parametrize("views", [False, True])
def test_only_a_temperature_of_single_views_is_used(run, pictures, views):
    (own,) = predict(run, pictures[:1])
    content = {
        "temperature": 0.1,
        "model_sha256": checksum(run / "model.safetensors"),
        "test_time_augmentation": views,
    }
    (run / "calibration.json").write_text(json.dumps(content))
    (single,) = predict(run, pictures[:1], test_time_augmentation=False)
    assert (single["probability"] == own["probability"]) is views
    (one,) = explain(run, pictures[:1])
    assert one.probability == pytest.approx(single["probability"], rel=1e-5)


def test_small_maps_are_passed_over_unless_asked_for(tmp_path, pictures):
    run = write_run(tmp_path / "resnet", "resnet50", 64)
    (one,) = explain(run, pictures[:1])
    assert (one.layer, one.heat.shape) == ("layer3", (4, 4))
    (one,) = explain(run, pictures[:1], layer="layer4")
    assert (one.layer, one.heat.shape) == ("layer4", (2, 2))


def test_command_writes_pictures_and_a_page(run, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["explain", str(run), *map(str, pictures), "--output", str(out)]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out / 'explain.html'}"
    names = {"001-lesion0.png", "002-lesion1.png", "explain.json", "explain.html"}
    assert {path.name for path in out.iterdir()} == names
    assert Image.open(out / "001-lesion0.png").size == (512, 256)
    page = Page((out / "explain.html").read_text(encoding="utf-8"))
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in page.elements)
    assert len(page.all("img")) == 4 and all(image["alt"] for image in page.all("img"))
    assert "not a diagnostic device" in page.words()
    assert cli.main([*arguments, "--json", "--class", "mel"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["class"] for entry in entries] == ["mel", "mel"]
    assert np.array(entries[0]["heat"]).shape[0] >= 4


def test_names_of_files_are_escaped(run, pictures, tmp_path):
    hostile = tmp_path / "<b>.png"
    pictures[0].rename(hostile)
    html = write_explanations(explain(run, [hostile]), tmp_path / "out").read_text()
    assert "<b>" not in html and "&lt;b&gt;" in html


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class", "wart"], "there is no class 'wart'; choose one of akiec"),
        (["--layer", "layer9"], "there is no layer 'layer9'; choose one of "),
    ],
)
def test_bad_options(run, pictures, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert cli.main(["explain", str(run), str(pictures[0]), "--output", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_logistic_regression_has_no_feature_maps(tmp_path, pictures):
    run = write_run(tmp_path / "logistic", "logistic-regression", 32)
    with pytest.raises(SkinfastError, match=r"no feature maps .* a run of resnet50 or cnn"):
        explain(run, pictures)


def test_images_too_small_for_maps_that_say_where():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(27, 7))
    with pytest.raises(SkinfastError, match=r"no feature maps are 4x4 .* train on larger images"):
        grad_cam(model, torch.randn(1, 3, 24, 24))


def test_a_picture_that_is_none(run, tmp_path, capsys):
    (tmp_path / "x.jpg").write_bytes(b"hello")
    out = str(tmp_path / "out")
    assert cli.main(["explain", str(run), str(tmp_path / "x.jpg"), "--output", out]) == 2
    assert "not a JPEG or PNG image" in capsys.readouterr().err
