"""A run against its test images and against other data, and broken files of it."""

import dataclasses

import numpy as np
import pytest

from skinfast.errors import SkinfastError
from skinfast.evaluation import evaluate_run, write_result
from skinfast.training import TrainConfig, train
from tests.data.folders import write_image, write_metadata


@pytest.fixture
def run(small_data, tmp_path):
    config = TrainConfig(
        model="logistic-regression", data=str(small_data), image_size=16, epochs=1, device="cpu"
    )
    folder = train(config, tmp_path / "run").directory
    write_result(folder)
    return folder


def write_data(root, rows):
    for image, _, _ in rows:
        write_image(root / "images" / f"{image}.png")
    write_metadata(root / "HAM10000_metadata.csv", rows)
    return str(root)


# --- other data -----------------------------------------------------------------------------------


def test_other_data_need_not_be_such_that_they_could_be_split(run, tmp_path):
    """One image of a class cannot be split by image, two lesions not into five folds."""
    rows = [("A1", "L1", "nv"), ("A2", "L2", "nv"), ("A3", "L2", "df")]
    data = write_data(tmp_path / "other", rows)
    for split in ("image", "lesion"):
        config = dataclasses.replace(TrainConfig.load(run / "config.json"), split=split)
        config.save(run / "config.json")
        metrics, problem, _ = evaluate_run(run, data=data)
        assert metrics["num_images"] == 3 and problem.split.train.size == 0


# --- broken files ---------------------------------------------------------------------------------


def _cut_off(file):
    file.write_bytes(file.read_bytes()[:-100])


def _no_names(file):
    np.savez(file, labels=np.zeros(3))


def _one_array(file):
    with file.open("wb") as stream:
        np.save(stream, np.zeros(3))


def _missing(file):
    file.unlink()


@pytest.mark.parametrize("damage", [_cut_off, _no_names, _one_array, _missing])
def test_broken_predictions_are_one_line(run, small_data, damage):
    damage(run / "predictions.npz")
    with pytest.raises(SkinfastError, match=r"predictions.npz is missing, cut .* --resume. or"):
        evaluate_run(run, data=str(small_data))


def test_metrics_without_an_epoch_are_one_line(run):
    (run / "metrics.jsonl").write_text("")
    before = (run / "result.json").read_bytes()
    with pytest.raises(SkinfastError, match=r"metrics.jsonl has no finished epoch; train again"):
        write_result(run)
    assert (run / "result.json").read_bytes() == before
