"""`skinfast calibrate` on a whole run: what is fitted is never what is measured."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from skinfast import cli
from skinfast.data import SyntheticLesions
from skinfast.errors import SkinfastError
from skinfast.evaluation import calibrate_run, evaluate_run, predict, write_result
from skinfast.report import write_report
from skinfast.training import TrainConfig, train


@pytest.fixture(autouse=True)
def few_lesions(monkeypatch):
    """300 synthetic lesions in place of 3,000."""
    monkeypatch.setattr(
        "skinfast.training.problem.SyntheticLesions",
        lambda image_size: SyntheticLesions(300, image_size),
    )


@pytest.fixture
def run(tmp_path):
    config = TrainConfig(
        model="logistic-regression", image_size=16, epochs=3, lr=0.01, device="cpu", split="lesion"
    )
    folder = train(config, tmp_path / "run").directory
    write_result(folder)
    return folder


def test_halves_share_no_image_and_no_lesion(run):
    calibration = calibrate_run(run)
    assert json.loads((run / "calibration.json").read_text()) == calibration
    dataset = SyntheticLesions(300, 16)
    lesion_of = dict(zip(dataset.image_ids, dataset.lesion_ids, strict=True))
    with np.load(run / "predictions.npz") as archive:
        test = set(archive["image_ids"].tolist())
    fitted = set(calibration["fitted_image_ids"])
    assert fitted < test and len(fitted) == calibration["num_fitted"]
    assert calibration["num_fitted"] + calibration["num_measured"] == len(test)
    assert not {lesion_of[i] for i in fitted} & {lesion_of[i] for i in test - fitted}
    assert calibration["before"]["num_images"] == calibration["num_measured"]
    assert calibration["lesions_shared_with_training"] == 0
    assert calibration["after"]["accuracy"] == calibration["before"]["accuracy"]


def test_the_temperature_helps_on_images_that_did_not_fit_it(run):
    # 48 features of 16x16 lesions in colour: the logistic regression is far too sure of itself.
    calibration = calibrate_run(run)
    assert calibration["temperature"] > 1.2
    assert calibration["after"]["loss"] < calibration["before"]["loss"]
    assert calibrate_run(run) == calibration
    assert calibrate_run(run, seed=1)["fitted_image_ids"] != calibration["fitted_image_ids"]


def test_evaluate_leaves_out_what_was_fitted(run):
    before, _, _ = evaluate_run(run)
    assert "calibrated" not in before
    calibration = calibrate_run(run)
    metrics, _, _ = evaluate_run(run)
    assert metrics["temperature"] == calibration["temperature"]
    assert metrics["calibration"] == before["calibration"]
    assert metrics["calibrated"]["num_images"] == calibration["num_measured"]
    assert metrics["calibrated"]["loss"] == pytest.approx(calibration["after"]["loss"])


def test_predict_says_which_probabilities_it_gives(run, tmp_path, capsys):
    folder, image = run, tmp_path / "lesion.png"
    Image.fromarray(SyntheticLesions(300, 64).images[0].numpy()).save(image)
    (raw,) = predict(folder, [image])
    assert raw["temperature"] is None
    assert cli.main(["predict", str(folder), str(image)]) == 0
    assert "not calibrated; `skinfast calibrate" in capsys.readouterr().err

    temperature = calibrate_run(folder)["temperature"]
    (scaled,) = predict(folder, [image])
    assert scaled["temperature"] == temperature
    raised = np.array(list(raw["probabilities"].values())) ** (1 / temperature)
    np.testing.assert_allclose(list(scaled["probabilities"].values()), raised / raised.sum())
    assert cli.main(["predict", str(folder), str(image)]) == 0
    assert f"calibrated with the run's temperature, {temperature:.3f}" in capsys.readouterr().err

    # Other weights: the temperature no longer means anything.
    config = TrainConfig.load(folder / "config.json")
    train(dataclasses.replace(config, epochs=config.epochs + 1), folder, resume=True)
    assert predict(folder, [image])[0]["temperature"] is None
    assert cli.main(["predict", str(folder), str(image)]) == 0
    assert "belongs to weights that it had before" in capsys.readouterr().err


def test_a_temperature_is_of_the_answers_that_it_was_fitted_to(run, tmp_path, capsys):
    config = dataclasses.replace(TrainConfig.load(run / "config.json"), test_time_augmentation=True)
    config.save(run / "config.json")
    image = tmp_path / "lesion.png"
    Image.fromarray(SyntheticLesions(300, 64).images[0].numpy()).save(image)
    (raw,) = predict(run, [image])
    (single,) = predict(run, [image], test_time_augmentation=False)
    assert raw["probability"] != pytest.approx(single["probability"], rel=1e-3)
    _, _, means = evaluate_run(run)
    temperature = calibrate_run(run)["temperature"]

    # The logits of the mean over the views are its logarithms.
    (scaled,) = predict(run, [image])
    assert scaled["temperature"] == temperature
    raised = np.array(list(raw["probabilities"].values())) ** (1 / temperature)
    np.testing.assert_allclose(list(scaled["probabilities"].values()), raised / raised.sum())
    metrics, _, again = evaluate_run(run)
    assert metrics["temperature"] == temperature and (again == means).all()

    # Single views have none.
    assert predict(run, [image], test_time_augmentation=False) == [single]
    metrics, _, _ = evaluate_run(run, test_time_augmentation=False)
    assert "calibrated" not in metrics and "temperature" not in metrics
    assert cli.main(["predict", str(run), str(image), "--no-test-time-augmentation"]) == 0
    assert "was fitted with test-time augmentation" in capsys.readouterr().err


def test_command_prints_both_rows_and_renews_the_report(run, capsys):
    write_report(run)
    before = (run / "report.html").read_text()
    assert cli.main(["calibrate", str(run)]) == 0
    out = capsys.readouterr().out
    assert "as trained" in out and "with temperature" in out and "flatter" not in out
    assert "nominally 95%, held the true error of calibrated models in 56% of cases" in out
    assert (run / "report.html").read_text() != before
    assert cli.main(["calibrate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_fitted"] > 0
    assert cli.main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    assert "calibrated with temperature" in out and "nominally 95%, held the true error" in out


def test_data_without_lesions_is_halved_by_image_and_says_so(run, monkeypatch):
    config = TrainConfig.load(run / "config.json")
    dataclasses.replace(config, split="image").save(run / "config.json")

    def without_lesions(image_size):
        dataset = SyntheticLesions(300, image_size)
        dataset.lesion_ids = None
        return dataset

    monkeypatch.setattr("skinfast.training.problem.SyntheticLesions", without_lesions)
    calibration = calibrate_run(run)
    assert calibration["grouped_by_lesion"] is False
    assert calibration["lesions_shared_with_training"] is None


def test_a_copy_s_test_images_are_named(run, monkeypatch, capsys):
    with np.load(run / "predictions.npz") as archive:
        first, count = archive["image_ids"][0], len(archive["image_ids"])

    def without_one(image_size):
        dataset = SyntheticLesions(300, image_size)
        dataset.image_ids[dataset.image_ids.index(first)] = "another"
        return dataset

    monkeypatch.setattr("skinfast.evaluation.run.SyntheticLesions", without_one)
    calibration = calibrate_run(run, data="synthetic")
    assert calibration["num_fitted"] + calibration["num_measured"] == count - 1
    said = f"{count - 1} of the run's {count} test images; the others are not in "
    assert calibration["test_images"].startswith(said)
    assert cli.main(["calibrate", str(run), "--data", "synthetic"]) == 0
    assert f"test images: {calibration['test_images']}\n" in capsys.readouterr().out


def test_lesions_that_trained_the_model_are_counted(run, capsys):
    config = TrainConfig.load(run / "config.json")
    dataclasses.replace(config, split="image").save(run / "config.json")
    assert calibrate_run(run)["lesions_shared_with_training"] > 0
    assert cli.main(["calibrate", str(run)]) == 0
    assert "these figures flatter; train with --split lesion" in capsys.readouterr().out


def test_predictions_that_say_nothing_have_no_temperature(small_data, tmp_path, capsys):
    # small_data is noise: nothing can be learnt from it that holds for other images.
    config = TrainConfig(
        model="logistic-regression", data=str(small_data), image_size=16, epochs=1, device="cpu"
    )
    folder = train(config, tmp_path / "noise").directory
    assert cli.main(["calibrate", str(folder)]) == 2
    assert "no temperature from 0.05 to 20 fits" in capsys.readouterr().err
    assert not (folder / "calibration.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"temperature": 1.0}',
        '{"temperature": 1.0, "model_sha256": "x"}',
        '{"temperature": -3, "model_sha256": "x", "test_time_augmentation": false}',
    ],
)
def test_a_broken_calibration_is_one_line(run, content):
    (run / "calibration.json").write_text(content)
    with pytest.raises(SkinfastError, match=r"calibration.json cannot be used .* calibrate. again"):
        evaluate_run(run)


def test_a_seed_out_of_range(run, capsys):
    assert cli.main(["calibrate", str(run), "--seed", "-1"]) == 2
    assert "--seed is -1; it needs to be from 0" in capsys.readouterr().err
    assert not (run / "calibration.json").exists()


def test_no_run(tmp_path, capsys):
    assert cli.main(["calibrate", str(tmp_path / "nothing")]) == 2
    assert "is missing" in capsys.readouterr().err
