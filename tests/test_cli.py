"""The command line: a whole run, and one line for everything that cannot be done."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from skinfast import cli
from skinfast.errors import SkinfastError
from skinfast.evaluation import evaluate_run, predict
from skinfast.evaluation.explain import explain
from skinfast.training import TrainConfig


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture
def trained(tmp_path, small_data):
    output = tmp_path / "run"
    assert run("train", "--data", small_data, "--image-size", 32, "--epochs", 1, "--output", output,
               "--device", "cpu") == 0  # fmt: skip
    return output


@pytest.fixture
def error_line(capsys):
    """Run a command that must fail; return its last line on stderr, after those of progress."""

    def fail(*arguments, code=2):
        capsys.readouterr()
        assert run(*arguments) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        *progress, line = captured.err.splitlines()
        assert line.startswith("skinfast: "), captured.err
        assert all(entry.startswith(("cnn on cpu: ", "epoch ")) for entry in progress)
        return line

    return fail


def test_train_leaves_the_whole_run_folder(trained):
    assert {p.name for p in trained.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "result.json",
        "predictions.npz",
        "model.safetensors",
        "checkpoint",
        "report.html",
    }
    result = json.loads((trained / "result.json").read_text())
    for key in (
        "accuracy",
        "balanced_accuracy",
        "f1_weighted",
        "f1_macro",
        "precision_macro",
        "recall_macro",
        "auc_macro",
        "per_class",
        "confusion_matrix",
        "majority_accuracy",
    ):
        assert key in result


def test_train_prints_the_table_and_names_the_report(tmp_path, small_data, capsys):
    assert run("train", "--data", small_data, "--image-size", 32, "--epochs", 1,
               "--output", tmp_path / "run") == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "always the commonest class" in out
    assert out.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"


def test_train_json_prints_only_json(tmp_path, small_data, capsys):
    assert run("train", "--data", small_data, "--model", "logistic-regression", "--image-size", 16,
               "--epochs", 1, "--output", tmp_path / "run", "--json") == 0  # fmt: skip
    captured = capsys.readouterr()
    assert json.loads(captured.out)["num_images"] == 22
    assert "epoch 1: train loss" in captured.err


def test_evaluate_repeats_the_result_of_training(trained, capsys):
    capsys.readouterr()
    assert run("evaluate", trained, "--json") == 0
    metrics = json.loads(capsys.readouterr().out)
    result = json.loads((trained / "result.json").read_text())
    assert metrics == {key: result[key] for key in metrics}


def test_evaluate_on_other_data_keeps_the_runs_normalisation(trained, small_data, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(small_data, moved)
    capsys.readouterr()
    assert run("evaluate", trained, "--data", moved, "--json") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["loss"] == json.loads((trained / "result.json").read_text())["loss"]


def test_evaluate_uses_all_images_of_data_that_the_run_has_not_seen(
    trained, small_data, tmp_path, capsys
):
    other = tmp_path / "other"
    shutil.copytree(small_data, other)
    metadata = other / "HAM10000_metadata.csv"
    metadata.write_text(metadata.read_text().replace("ISIC_", "OTHER_"))
    for image in (other / "images").iterdir():
        image.rename(image.with_name(image.name.replace("ISIC_", "OTHER_")))
    capsys.readouterr()
    assert run("evaluate", trained, "--data", other, "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 108


def test_predict_agrees_with_the_predictions_of_the_run(trained, small_data, capsys):
    with np.load(trained / "predictions.npz") as archive:
        image_id, probabilities = archive["image_ids"][3], archive["probabilities"][3]
    path = small_data / "images" / f"{image_id}.png"
    capsys.readouterr()
    assert run("predict", trained, path, path, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == second and first["image"] == str(path)
    np.testing.assert_allclose(list(first["probabilities"].values()), probabilities, atol=1e-5)
    assert run("predict", trained, path) == 0
    assert f"{path}: " in capsys.readouterr().out


def test_predict_computes_as_the_run_does(trained, small_data):
    """In float32 by the fused ops it would differ: a temperature is of the run's own answers."""
    for changes in ({"precision": "bfloat16"}, {"precision": "bfloat16", "backend": "torch"}):
        config = TrainConfig.load(trained / "config.json")
        dataclasses.replace(config, **changes).save(trained / "config.json")
        _, problem, probabilities = evaluate_run(trained)
        names = [problem.dataset.image_ids[i] for i in problem.split.test]
        paths = [small_data / "images" / f"{name}.png" for name in names]
        answers = [list(entry["probabilities"].values()) for entry in predict(trained, paths)]
        np.testing.assert_allclose(answers, probabilities, atol=1e-6)
        (one,) = explain(trained, paths[:1], class_name="nv")
        (alone,) = predict(trained, paths[:1])
        assert one.probability == pytest.approx(alone["probabilities"]["nv"], abs=1e-6)


def test_test_time_augmentation_is_a_setting_of_the_run_and_of_the_commands(
    trained, tmp_path, small_data, capsys
):
    assert run("train", "--data", small_data, "--image-size", 32, "--epochs", 1, "--device", "cpu",
               "--output", tmp_path / "views", "--test-time-augmentation") == 0  # fmt: skip
    plain, views = (
        json.loads((folder / "result.json").read_text()) for folder in (trained, tmp_path / "views")
    )
    assert views["loss"] != plain["loss"]
    capsys.readouterr()
    assert run("evaluate", trained, "--test-time-augmentation", "--json") == 0
    assert json.loads(capsys.readouterr().out)["loss"] == views["loss"]
    image = small_data / "images" / "ISIC_nv000.png"
    mirrored = tmp_path / "mirrored.png"
    Image.open(image).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(mirrored)
    assert run("predict", trained, image, mirrored, "--test-time-augmentation", "--json") == 0
    one, other = (entry["probability"] for entry in json.loads(capsys.readouterr().out))
    assert one == pytest.approx(other, abs=1e-5)


def test_preset_fills_in_what_was_not_given(tmp_path, small_data, capsys):
    output = tmp_path / "run"
    given = ("--preset", "best", "--epochs", 2, "--no-rotate", "--validation-fraction", 0.2)
    assert run("train", "--data", small_data, "--model", "logistic-regression", "--image-size", 16,
               *given, "--output", output) == 0  # fmt: skip
    config = json.loads((output / "config.json").read_text())
    assert config["lr_schedule"] == "one-cycle" and config["test_time_augmentation"]
    assert config["epochs"] == 2 and config["rotate"] is False and config["augment"] is True
    assert run("train", *given, "--output", output, "--resume") == 0
    result = json.loads((output / "result.json").read_text())
    scores = [
        json.loads(line)["validation_balanced_accuracy"]
        for line in (output / "metrics.jsonl").read_text().splitlines()
    ]
    assert result["epochs"] == 2 and result["kept_epoch"] == 1 + scores.index(max(scores))
    assert f"validation balanced accuracy {scores[1]:.4f}, " in capsys.readouterr().err


def test_resume_goes_on_with_more_epochs(trained, capsys):
    assert run("train", "--output", trained, "--resume", "--epochs", 2) == 0
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert json.loads((trained / "config.json").read_text())["epochs"] == 2


def test_skip_bad_images_goes_on_and_records_them(tmp_path, small_data, capsys):
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    (data / "images" / "ISIC_nv000.png").write_bytes(b"not an image")
    arguments = ["train", "--data", data, "--image-size", 32, "--epochs", 1, "--output"]
    assert run(*arguments, tmp_path / "refused") == 2
    assert not (tmp_path / "refused").exists()
    assert "--skip-bad-images" in capsys.readouterr().err
    assert run(*arguments, tmp_path / "run", "--skip-bad-images") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [image for image, _ in result["data"]["skipped"]] == ["ISIC_nv000"]


# --- bad input: one line each, nothing damaged ----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", 7], "--image-size is 7; it needs to be from 8 to 1024"),
        (["--image-size", 16], "--image-size is 16, but the CNN's three pools need at least 24"),
        (["--epochs", 0], "--epochs is 0"),
        (["--lr", "-1"], "--lr is -1.0"),
        (["--device", "tpu"], "--device is 'tpu'; choose auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device is cuda:99, but "),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_options(tmp_path, small_data, error_line, options, message):
    base = ["train", "--data", small_data, "--output", tmp_path / "run"]
    assert message in error_line(*base, *options)
    assert not (tmp_path / "run").exists()


def test_unknown_choice_is_explained_by_the_parser(capsys):
    with pytest.raises(SystemExit) as exit:
        run("train", "--model", "vgg", "--output", "x")
    assert exit.value.code == 2 and "invalid choice: 'vgg'" in capsys.readouterr().err


def _without_metadata(data):
    (data / "HAM10000_metadata.csv").unlink()


def _unknown_diagnosis(data):
    file = data / "HAM10000_metadata.csv"
    file.write_text(file.read_text().replace("ISIC_df000,df", "ISIC_df000,wart"))


def _missing_image(data):
    (data / "images" / "ISIC_df000.png").unlink()


def _truncated_image(data):
    file = data / "images" / "ISIC_df000.png"
    file.write_bytes(file.read_bytes()[:200])


def _no_image(data):
    (data / "images" / "ISIC_df000.png").write_bytes(b"hello")


def _one_pixel(data):
    Image.new("RGB", (1, 1)).save(data / "images" / "ISIC_df000.png")


def _huge(data):
    Image.new("1", (10_000, 10_000)).save(data / "images" / "ISIC_df000.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_metadata, "metadata"),
        (_unknown_diagnosis, "wart"),
        (_missing_image, "ISIC_df000"),
        (_truncated_image, "ISIC_df000"),
        (_no_image, "ISIC_df000"),
        (_one_pixel, "1x1 pixels, less than 8 on a side"),
        (_huge, "10000x10000 pixels, more than 50 megapixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_data_folders(tmp_path, small_data, error_line, damage, message):
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    damage(data)
    before = sorted(p.name for p in data.rglob("*"))
    line = error_line("train", "--data", data, "--image-size", 32, "--output", tmp_path / "run")
    assert message in line
    assert not (tmp_path / "run").exists()
    assert sorted(p.name for p in data.rglob("*")) == before


def test_empty_split(tmp_path, small_data, error_line):
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    lines = (data / "HAM10000_metadata.csv").read_text().splitlines()
    (data / "HAM10000_metadata.csv").write_text("\n".join(lines[:2]) + "\n")
    for split, message in {"image": "has 1 image", "lesion": "would be empty"}.items():
        line = error_line("train", "--data", data, "--split", split, "--image-size", 32,
                          "--output", tmp_path / "run")  # fmt: skip
        assert message in line
        assert not (tmp_path / "run").exists()


def test_run_folder_that_exists(trained, small_data, error_line):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    line = error_line("train", "--data", small_data, "--output", trained)
    assert "exists; choose another --output, or continue it with --resume" in line
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


def test_output_that_is_a_file(tmp_path, small_data, error_line):
    (tmp_path / "run").write_text("mine")
    assert "is a file" in error_line("train", "--data", small_data, "--output", tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_resume_of_nothing(tmp_path, error_line):
    assert "is missing" in error_line("train", "--output", tmp_path / "run", "--resume")


def test_resume_with_another_model(trained, error_line):
    line = error_line("train", "--output", trained, "--resume", "--model", "resnet50")
    assert "was started with --model cnn, not resnet50" in line


def test_resume_from_a_cut_off_checkpoint(trained, error_line):
    file = trained / "checkpoint" / "state.pt"
    file.write_bytes(file.read_bytes()[:1000])
    assert "cut off or broken" in error_line("train", "--output", trained, "--resume")


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_run_that_is_not_there(tmp_path, small_data, error_line, command):
    images = [small_data / "images" / "ISIC_nv000.png"] if command == "predict" else []
    assert "is missing" in error_line(command, tmp_path / "run", *images)


def test_predict_on_what_is_no_image(trained, tmp_path, error_line):
    (tmp_path / "x.jpg").write_bytes(b"hello")
    assert "not a JPEG or PNG image" in error_line("predict", trained, tmp_path / "x.jpg")
    assert "No such file" in error_line("predict", trained, tmp_path / "nowhere.jpg")


def test_no_permission_to_write(tmp_path, small_data, error_line, monkeypatch):
    # Simulated: tests may run as root, who may write everywhere.
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "run"))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    line = error_line("train", "--data", small_data, "--image-size", 32,
                           "--output", tmp_path / "run")  # fmt: skip
    assert "Permission denied; choose a folder you may write to" in line


def test_disk_full_while_saving(tmp_path, small_data, error_line, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("skinfast.training.loop.save_model", full)
    line = error_line("train", "--data", small_data, "--image-size", 32,
                           "--epochs", 1, "--output", tmp_path / "run")  # fmt: skip
    assert "model.safetensors: No space left on device; free space on that disk" in line


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("Allocation on device"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_names_what_to_lower(error_line, monkeypatch, error):
    _fail_with(error, monkeypatch)
    assert "out of memory; lower --batch-size or --image-size" in error_line("evaluate", "run")


@pytest.mark.parametrize(
    "message",
    ["CUDA error: an illegal memory access was encountered", "unsupported memory format option"],
)
def test_bugs_that_speak_of_memory_are_shown_as_bugs(monkeypatch, message):
    _fail_with(RuntimeError(message), monkeypatch)
    with pytest.raises(RuntimeError, match=message):
        run("evaluate", "run")


def _fail_with(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("skinfast.evaluation.evaluate_run", fail)


def test_interrupt_names_resume(monkeypatch, capsys, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("skinfast.training.config.TrainConfig.__post_init__", interrupt)
    assert run("train", "--output", tmp_path / "run") == 130
    assert "--resume" in capsys.readouterr().err


# --- the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "evaluate",
        "predict",
        "calibrate",
        "explain",
        "audit",
        "gradient-flow",
        "reproduce",
        "cross-validate",
        "imbalance",
        "bench",
        "info",
        "selfcheck",
    ],
)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        run(command, "--help")
    assert exit.value.code == 0
    assert f"example: skinfast {command}" in capsys.readouterr().out.replace("\n", " ")


def test_info_prints_what_is_installed(capsys):
    assert run("info") == 0
    assert "cpu kernels" in capsys.readouterr().out
    assert run("info", "--json") == 0
    assert json.loads(capsys.readouterr().out)["torch"]


def test_selfcheck_fails_where_a_check_fails(monkeypatch, capsys, tmp_path):
    from skinfast._selfcheck import Check

    checks = [Check("add_relu", "cpu", "float32", 3, ""), Check("x", "cpu", "float32", 1, "off")]
    monkeypatch.setattr("skinfast._selfcheck.selfcheck", lambda: checks)
    assert run("selfcheck", "--output", tmp_path / "check.json") == 1
    assert "1 of 2 checks passed" in capsys.readouterr().out
    assert json.loads((tmp_path / "check.json").read_text())["passed"] is False
    monkeypatch.setattr("skinfast._selfcheck.selfcheck", lambda: checks[:1])
    assert run("selfcheck", "--json") == 0


def test_bench_runs_the_scripts_of_the_checkout(capfd, tmp_path):
    file = tmp_path / "bench.json"
    assert run("bench", "cross_entropy", "--quick", "--device", "cpu", "--output", file) == 0
    assert "cross_entropy" in capfd.readouterr().out
    (row,) = json.loads(file.read_text())["rows"]
    assert row["ratio"] > 0 and file.with_suffix(".svg").is_file()


def test_bench_of_what_is_not_there(error_line):
    line = error_line("bench", "softmax")
    assert "there is no benchmark 'softmax'; choose one of models, ops, resnet50," in line


def test_bench_of_an_installed_package(error_line, monkeypatch, tmp_path):
    monkeypatch.setattr("skinfast.__file__", str(tmp_path / "skinfast" / "__init__.py"))
    assert "run this in a checkout of the repository" in error_line("bench")


def test_importing_skinfast_is_light():
    program = (
        "import sys, skinfast; print(sorted({'torch', 'numpy', 'sklearn'} & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    )
    assert output.stdout.strip() == "[]"


def test_error_type_is_a_value_error():
    assert issubclass(SkinfastError, ValueError)
