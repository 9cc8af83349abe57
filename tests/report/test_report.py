"""write_report: a valid, self-contained, safe page, and one clear line on a broken folder."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skinfast.errors import SkinfastError
from skinfast.report import write_report

MakeRun = Callable[..., Path]

VOID = {"br", "img", "link", "meta"}


class Page(HTMLParser):
    """Every element of a page, its text, and the assurance that its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.text += " "
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"<{tag}> repeats an attribute"
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self) -> str:
        return " ".join(self.text.split())


def render(run: Path) -> tuple[str, Page]:
    path = write_report(run)
    assert path == run / "report.html"
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_arrays(path: Path, **changes: Any) -> None:
    with np.load(path) as arrays:
        content = {**arrays, **changes}
    np.savez(path, **{name: array for name, array in content.items() if array is not None})


def test_says_what_the_run_says(make_run: MakeRun) -> None:
    run = make_run()
    result = json.loads((run / "result.json").read_text())
    _, page = render(run)
    words = page.words()

    assert "resnet50 HAM10000, folder ham10000, 64 \u00d7 64 pixels." in words
    assert "8,012 training and 2,003 test images, 20 epochs in 41.2 s" in words
    assert f"always answering nv, the commonest class {result['majority_accuracy']:.3f}" in words
    for key in ["accuracy", "balanced_accuracy", "f1_macro", "f1_weighted", "precision_macro"]:
        assert f"{result[key]:.3f}" in words
    for entry in result["per_class"]:
        for key in ["recall", "precision", "f1", "auc"]:
            assert f"{entry[key]:.3f}" in words
    for row in result["confusion_matrix"]:
        assert all(f"{count:,}" in words for count in row)
    assert "Melanocytic nevi" in words
    assert "ISIC_0031234 the file is cut off" in words
    assert "batch_size 128" in words
    assert "save_every null" in words
    assert "NVIDIA H100 80GB HBM3" in words
    assert "not a diagnostic device" in words


def test_page_is_self_contained_and_accessible(make_run: MakeRun) -> None:
    html, page = render(make_run(temperature=1.2))
    assert html.startswith("<!DOCTYPE html>\n")
    assert page.all("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.elements)
    assert "@import" not in html

    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
        for target in re.findall(r"url\(([^)]*)\)", attributes.get("style") or ""):
            assert target.startswith("#")

    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^")]+)', html)
    assert referred
    assert set(referred) <= set(ids)

    assert len(page.all("img")) == 12
    assert all(image["alt"] for image in page.all("img"))
    assert len(page.all("svg")) == 4
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))


def test_plots_take_every_colour_from_the_page(make_run: MakeRun) -> None:
    html, page = render(make_run(temperature=1.2))
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert not re.search(r"(fill|stroke): ?#", drawings)
    assert "majority class 0.669" in page.words()
    for variable in set(re.findall(r"var\((--\w+)\)", html)) - {"--share"}:
        assert html.count(f"{variable}:") == 2, f"{variable} is not set for light and for dark"


def test_right_and_wrong_are_said_in_words(make_run: MakeRun) -> None:
    run = make_run()
    with np.load(run / "predictions.npz") as arrays:
        index = arrays["sample_index"]
        guess = arrays["probabilities"][index].argmax(axis=1)
        num_right = int((guess == arrays["labels"][index]).sum())
    _, page = render(run)
    assert 0 < num_right < len(index)
    assert page.text.count("✓ right") == num_right
    assert page.text.count("✗ wrong") == len(index) - num_right


def test_licence_is_stated_for_ham10000_only(make_run: MakeRun) -> None:
    assert "CC BY-NC 4.0" in render(make_run())[1].words()
    assert "CC BY-NC" not in render(make_run(source="synthetic"))[1].words()


def percent(share: float) -> str:
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def test_calibration_is_that_of_the_run(make_run: MakeRun) -> None:
    run = make_run()
    figures = json.loads((run / "result.json").read_text())["calibration"]
    _, page = render(run)
    words = page.words()
    low, high = figures["interval"]
    error = figures["expected_calibration_error"]
    assert f"as trained {error:.3f} {low:.3f} to {high:.3f}" in words
    assert "No temperature was fitted" in words
    assert "the interval, nominally 95%, held the true error of calibrated models in 56%" in words
    assert f"the model's own, calibration error {error:.3f}" in words
    for row in figures["risk_coverage"]:
        shares = " ".join(percent(share) for share in row["answered"].values())
        balanced = row["balanced_accuracy"]
        assert (
            f"{row['coverage']:.0%} {row['threshold']:.3f} {row['accuracy']:.3f} "
            f"{'n/a' if balanced is None else f'{balanced:.3f}'} {shares}"
        ) in words
    assert any(
        f"as trained the calibration error is {error:.3f}." in (svg["aria-label"] or "")
        for svg in page.all("svg")
    )


def test_temperature_is_shown_with_what_it_was_measured_on(make_run: MakeRun) -> None:
    run = make_run(temperature=1.25)
    fitted = json.loads((run / "calibration.json").read_text())
    words = render(run)[1].words()
    for name, key in (("as trained", "before"), ("with temperature", "after")):
        error = fitted[key]["expected_calibration_error"]
        assert f"{name}, measured half {error:.3f}" in words
    assert "The temperature is 1.250. It was fitted on 1,002 of the test images" in words
    assert "no lesion being in both halves" in words
    assert "707 test images show a lesion that trained the model too" in words


def test_temperature_of_other_weights_is_not_shown(make_run: MakeRun) -> None:
    run = make_run(temperature=1.25)
    (run / "model.safetensors").write_bytes(b"trained on")
    assert "No temperature was fitted" in render(run)[1].words()


def test_a_run_of_before_calibration_was_measured(make_run: MakeRun) -> None:
    run = make_run()
    edit_json(run / "result.json", lambda result: result.pop("calibration"))
    _, page = render(run)
    assert "probabilities not measured against outcomes" in page.words()
    assert len(page.all("svg")) == 2


def test_broken_calibration(make_run: MakeRun) -> None:
    run = make_run(temperature=1.25)
    edit_json(run / "calibration.json", lambda fitted: fitted["after"].pop("bins"))
    assert_refused(run, r"calibration.json lacks figures .* run `skinfast calibrate` again")
    edit_json(run / "calibration.json", lambda fitted: fitted.pop("num_fitted"))
    assert_refused(run, r"calibration.json lacks figures; run `skinfast calibrate` again")
    (run / "calibration.json").write_text("{")
    assert_refused(run, r"calibration.json cannot be used")
    (run / "calibration.json").unlink()
    edit_json(run / "result.json", lambda result: result.update(calibration={}))
    assert_refused(run, r"result.json lacks figures of the calibration")


def test_model_card_says_what_it_is_for_and_where_it_is_weak(make_run: MakeRun) -> None:
    run = make_run()
    weakest = min(
        json.loads((run / "result.json").read_text())["per_class"],
        key=lambda entry: entry["recall"],
    )
    words = render(run)[1].words()
    assert "This is not a diagnostic device, and nobody has tested it as one." in words
    assert f"recall {weakest['recall']:.3f} of {weakest['support']}" in words
    assert "the split is by image, so photographs of one lesion can be on both sides" in words
    edit_json(run / "config.json", lambda config: config.update(split="lesion"))
    assert "of lesions that did not train the model" in render(run)[1].words()


def test_a_short_run_without_samples(make_run: MakeRun) -> None:
    _, page = render(make_run(num_epochs=1, num_samples=0, skipped=()))
    words = page.words()
    assert "1 epoch in" in words
    assert "The run kept no sample images." in words
    assert "Every image could be read." in words
    assert page.all("img") == []


def test_undefined_and_diverged_figures(make_run: MakeRun) -> None:
    run = make_run(num_epochs=2)
    edit_json(run / "result.json", lambda result: result.update(auc_macro=None))
    nothing = {"train_loss": float("nan"), "test_loss": None}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(json.loads(line) | nothing) + "\n" for line in lines)
    )

    _, page = render(run)
    assert "AUC, macro, one class against the rest n/a" in page.words()
    descriptions = [svg["aria-label"] for svg in page.all("svg")]
    assert (
        "Cross-entropy loss by epoch: train has no finite value; test has no finite value."
        in descriptions
    )


def test_hostile_text_is_escaped(make_run: MakeRun) -> None:
    attack = '<b onclick="x">\'&amp;{{ 7 * 7 }}</b>'
    run = make_run(
        class_names=[attack, "bcc", "bkl", "df", "mel", attack + "nv", "vasc"],
        image_ids=lambda i: f"<i>{i}</i>",
        source=attack,
        skipped=((attack, attack),),
    )
    edit_json(run / "config.json", lambda config: config.update({attack: attack, "model": attack}))
    edit_json(run / "result.json", lambda result: result["environment"].update({attack: attack}))

    html, page = render(run)
    assert {"b", "i"}.isdisjoint(tag for tag, _ in page.elements)
    assert attack in page.text
    assert attack + "nv" in page.text
    assert "<i>" in page.text
    assert attack not in html


def test_text_that_no_file_can_hold_is_replaced(make_run: MakeRun) -> None:
    run = make_run()
    edit_json(run / "config.json", lambda config: config.update(data="/data/\udcff"))
    assert "/data/?" in render(run)[1].words()


def test_equal_runs_give_equal_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    import matplotlib

    first = write_report(make_run()).read_bytes()
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False}):
        second = write_report(tmp_path / "run").read_bytes()
    assert first == second


def test_leaves_the_caller_s_matplotlib_alone(make_run: MakeRun) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(make_run())
    assert dict(matplotlib.rcParams) == before


def test_a_full_disk_keeps_the_old_report(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    (run / "report.html").write_text("the old report")
    before = sorted(run.iterdir())

    def no_space(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left on device"):
            write_report(run)
    assert (run / "report.html").read_text() == "the old report"
    assert sorted(run.iterdir()) == before

    write_report(run)
    assert sorted(run.iterdir()) == before
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")


def assert_refused(run: Path, message: str) -> None:
    with pytest.raises(SkinfastError, match=message) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_no_folder(tmp_path: Path) -> None:
    assert_refused(tmp_path / "typo", r"typo: no such run folder; give the --output folder")


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json", "predictions.npz"])
def test_missing_or_cut_off_file(make_run: MakeRun, name: str) -> None:
    path = make_run() / name
    whole = path.read_bytes()
    for length in [1, 3, len(whole) // 3, len(whole) - 3]:
        path.write_bytes(whole[:length])
        assert_refused(path.parent, rf"{name}.*: cut off or not .*; finish the run with")
    path.write_bytes(b"\xff\xfe not text, not zip")
    assert_refused(path.parent, rf"{name}: (cannot be read|cut off or not)")
    path.unlink()
    assert_refused(path.parent, rf"{name}: missing, the run has not finished; finish the run with")


def test_a_broken_epoch_is_named_by_its_line(make_run: MakeRun) -> None:
    path = make_run() / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], '{"epoch": 3}']))
    assert_refused(path.parent, r"metrics.jsonl, line 3: has no 'train_loss'")
    path.write_text("")
    assert_refused(path.parent, r"metrics.jsonl: empty, no epoch has finished")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("f1_macro"), "result.json: has no 'f1_macro'"),
        (lambda r: r.update(accuracy="high"), "result.json: 'accuracy' cannot be 'high'"),
        (lambda r: r["data"].pop("skipped"), "result.json, 'data': has no 'skipped'"),
        (lambda r: r["data"].update(skipped=["x"]), r"'skipped' is not a list of \[image id"),
        (
            lambda r: r["data"].update(class_counts_test={"nv": "many"}),
            "'class_counts_test' holds something else than counts",
        ),
        (lambda r: r["per_class"][2].pop("recall"), "'per_class': has no 'recall'"),
        (lambda r: r["per_class"].__setitem__(0, 3), "'per_class': not a JSON object"),
        (lambda r: r["per_class"].pop(), "'per_class' does not list the classes"),
        (lambda r: r["confusion_matrix"].pop(), "'confusion_matrix' is not 7 x 7 counts"),
        (lambda r: r["confusion_matrix"][1].pop(), "'confusion_matrix' is not 7 x 7 counts"),
    ],
)
def test_result_that_does_not_hold_together(
    make_run: MakeRun, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    run = make_run()
    edit_json(run / "result.json", change)
    assert_refused(run, message)


def test_json_that_is_no_object(make_run: MakeRun) -> None:
    run = make_run()
    (run / "config.json").write_text("[1, 2]")
    assert_refused(run, "config.json: not a JSON object")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "predictions.npz: has no array 'labels'"),
        ({"labels": np.full(2003, 7)}, "do not fit each other or the classes of result.json"),
        ({"labels": np.zeros(2003)}, "do not fit"),
        ({"labels": np.int64(0)}, "do not fit"),
        ({"image_ids": np.array(["a", "b"])}, "do not fit"),
        ({"probabilities": np.zeros((2003, 6), np.float32)}, "do not fit"),
        ({"sample_index": np.full(12, 2003)}, "do not fit"),
        ({"sample_index": np.full(12, -1)}, "do not fit"),
        ({"sample_images": np.zeros((12, 8, 8, 3), np.float32)}, "do not fit"),
        ({"sample_images": np.zeros((11, 8, 8, 3), np.uint8)}, "do not fit"),
        ({"sample_images": np.zeros((12, 8, 8), np.uint8)}, "do not fit"),
    ],
)
def test_predictions_that_do_not_fit(
    make_run: MakeRun, changes: dict[str, Any], message: str
) -> None:
    run = make_run()
    edit_arrays(run / "predictions.npz", **changes)
    assert_refused(run, message)


def test_pickles_are_not_opened(make_run: MakeRun) -> None:
    run = make_run()
    edit_arrays(run / "predictions.npz", image_ids=np.array([None] * 2003))
    assert_refused(run, "predictions.npz: cut off or not an .npz file .*allow_pickle")


def test_importing_the_package_is_light() -> None:
    program = (
        "import sys, skinfast.report; "
        "sys.exit(any(m in sys.modules for m in ('matplotlib', 'jinja2', 'PIL', 'torch')))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
