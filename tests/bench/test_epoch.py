"""bench_epoch: the quick form end to end, and its rules."""

import json
import sys

import bench_epoch
import power
import pytest
import report
import torch
from harness import ResultsDifferError
from trainers import PyTorch

from skinfast.training import TrainConfig, prepare


@pytest.mark.parametrize("model", ["cnn", "logistic-regression"])
def test_quick_run_writes_table_plot_and_json(model, small_data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "epoch.json"
    options = ["--device", "cpu", "--quick", "--data", str(small_data), "--output", str(output)]
    options += ["--model", model, "--batch-size", "16", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_epoch", *options])
    assert report.run(bench_epoch.main) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["model"], row["images"], row["steps"]) == (model, "32x32", 5)
    assert row["contenders"].keys() == {"skinfast", "eager"}
    for facts in row["contenders"].values():
        assert facts["images_per_second"] == pytest.approx(80 / facts["epoch_seconds"])
        assert 0 < facts["accuracy"] <= 1
        assert facts["watts"] is facts["memory"] is None
    assert row["modes"] == {"eager": row["contenders"]["eager"]["epoch_seconds"]}
    assert output.with_suffix(".svg").is_file()
    assert "images/s, accuracy 0." in capsys.readouterr().out


def test_a_contender_that_does_not_learn_is_found(small_data, monkeypatch):
    problem = prepare(TrainConfig(data=str(small_data), image_size=32, batch_size=16, device="cpu"))
    answers = iter([0.7, 0.5])
    monkeypatch.setattr(bench_epoch, "accuracy_after", lambda *args: next(answers))
    bench = report.Bench(torch.device("cpu"), 1, lambda call, repeats: call() and 1.0)
    builds = bench_epoch.contenders(problem.device, "cnn", compiled=False)
    with pytest.raises(ResultsDifferError, match="accuracies after 1 epochs differ"):
        bench_epoch.compare(problem, builds, bench, 1)


def test_contenders_of_a_gpu():
    builds = bench_epoch.contenders(torch.device("cuda"), "resnet50", compiled=True)
    assert list(builds) == ["skinfast", "eager", "CUDA graph", "compiled"]
    assert builds["compiled"].keywords == {
        "layout": "channels_last", "compiled": True, "fused": True,
    }  # fmt: skip
    assert issubclass(builds["CUDA graph"].func, PyTorch)


def test_power_is_the_mean_of_the_later_readings():
    assert power.mean_reading("90.1\n[N/A]\n100\n300.5\n 301.5\n3") == 301
    assert power.mean_reading("[N/A]\n") is None
    assert power.mean_watts(torch.device("cpu"), int, 1.0) is None
