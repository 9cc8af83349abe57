"""A run against its test images and against other data, and broken files of it."""

import dataclasses

import numpy as np
import pytest

from skinfast import cli
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
        assert (
            metrics["test_images"] == f"all 3 images of {data}, none of them of the run's own data"
        )


def names_of_test(run):
    with np.load(run / "predictions.npz") as archive:
        return archive["image_ids"].tolist()


def names_measured(problem):
    return [problem.dataset.image_ids[i] for i in problem.split.test]


def rows_of(names):
    """Rows of small_data."""
    return [(name, name.replace("ISIC", "HAM"), name[5:-3]) for name in names]


def test_a_copy_is_measured_on_the_test_images_that_it_has(run, small_data, tmp_path, capsys):
    names = sorted(names_of_test(run))
    trained = [path.stem for path in (small_data / "images").iterdir() if path.stem not in names]
    whole = write_data(tmp_path / "whole", rows_of(names + trained))
    metrics, problem, _ = evaluate_run(run, data=whole)
    assert names_measured(problem) == names
    assert metrics["test_images"] == f"the run's 22 test images, found in {whole}"

    data = write_data(tmp_path / "copy", rows_of(names[1:] + trained))
    metrics, problem, _ = evaluate_run(run, data=data)
    assert names_measured(problem) == names[1:] and metrics["num_images"] == 21
    said = f"21 of the run's 22 test images; the others are not in {data}"
    assert metrics["test_images"] == said
    assert cli.main(["evaluate", str(run), "--data", data]) == 0
    assert f"test images: {said}\n" in capsys.readouterr().out
    assert "test_images" not in evaluate_run(run)[0]


def test_images_that_trained_are_not_measured(run, small_data, tmp_path):
    names = [path.stem for path in (small_data / "images").iterdir()]
    trained = sorted(set(names) - set(names_of_test(run)))[:5]
    data = write_data(tmp_path / "other", [*rows_of(trained), ("NEW1", "L1", "nv")])
    metrics, problem, _ = evaluate_run(run, data=data)
    assert names_measured(problem) == ["NEW1"]
    assert metrics["test_images"] == f"1 of the 6 images of {data}; the others trained the model"

    data = write_data(tmp_path / "seen", rows_of(trained))
    with pytest.raises(SkinfastError, match=r"seen has only images that trained the model; give"):
        evaluate_run(run, data=data)

    config = dataclasses.replace(TrainConfig.load(run / "config.json"), data="gone")
    config.save(run / "config.json")
    metrics, _, _ = evaluate_run(run, data=data)
    assert metrics["test_images"] == (
        f"all 5 images of {data}; whether some of them trained the model is not known, for the "
        "data of the run, gone, cannot be read"
    )


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
