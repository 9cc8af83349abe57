"""Cross-validation: every image answered for once, folds shared, differences paired."""

import dataclasses
import json

import numpy as np
import pytest

from skinfast import cli
from skinfast.data import HAM10000
from skinfast.errors import SkinfastError
from skinfast.evaluation import classification_metrics
from skinfast.evaluation.bootstrap import METRICS
from skinfast.experiments import cross_validate


@pytest.fixture
def configs(config):
    config = dataclasses.replace(config, folds=3)
    return {"slow": config, "fast": dataclasses.replace(config, lr=0.05)}


def test_every_image_is_answered_for_once_a_repeat(configs, tmp_path, paired_data):
    lines = []
    content = cross_validate(configs, tmp_path, repeats=2, replicates=50, on_line=lines.append)
    assert len(lines) == 1 + 2 * 2 * 3
    dataset = HAM10000(paired_data, 16)
    with np.load(tmp_path / "out_of_fold_slow.npz", allow_pickle=False) as archive:
        kept = dict(archive)
    with np.load(tmp_path / "out_of_fold_fast.npz", allow_pickle=False) as archive:
        other = dict(archive)
    assert kept["image_ids"].tolist() == sorted(dataset.image_ids)
    label_of = dict(zip(dataset.image_ids, dataset.labels.tolist(), strict=True))
    assert kept["labels"].tolist() == [label_of[name] for name in kept["image_ids"]]
    assert kept["probabilities"].shape == (2, len(dataset), 7)
    np.testing.assert_allclose(kept["probabilities"].sum(axis=2), 1, atol=1e-5)
    assert kept["folds"].shape == (2, len(dataset)) and set(kept["folds"].ravel()) == {0, 1, 2}
    np.testing.assert_array_equal(kept["folds"], other["folds"])  # the same for all models
    assert not np.array_equal(kept["folds"][0], kept["folds"][1])
    for folds in kept["folds"]:  # a lesion lies in one fold
        pairs = set(zip(kept["lesion_ids"], folds, strict=True))
        assert len(pairs) == len(set(kept["lesion_ids"]))

    for name, arrays in (("slow", kept), ("fast", other)):
        each = [classification_metrics(arrays["labels"], p, list("abcdefg"))
                for p in arrays["probabilities"]]  # fmt: skip
        for metric in METRICS:
            figure = content["models"][name]["metrics"][metric]
            assert figure["value"] == pytest.approx(np.mean([e[metric] for e in each]))
            assert figure["low"] <= figure["high"]
        assert len(content["models"][name]["each_fold"]) == 6
        files = (tmp_path / "runs" / name).rglob("result.json")
        results = [json.loads(file.read_text()) for file in files]
        commits = {str(result["environment"].get("commit")) for result in results}
        assert content["models"][name]["commits"] == sorted(commits) and len(results) == 6

    (comparison,) = content["comparisons"]
    for metric in METRICS:
        gap = comparison["difference"][metric]["value"]
        one, two = (content["models"][name]["metrics"][metric]["value"] for name in configs)
        assert gap == pytest.approx(one - two)
    assert json.loads((tmp_path / "cross_validation.json").read_text()) == content
    text = (tmp_path / "cross_validation.md").read_text()
    assert "| slow minus fast |" in text and f"{one:.3f} [" in text


def test_a_second_call_trains_nothing_and_says_the_same(configs, tmp_path):
    first = cross_validate(configs, tmp_path, replicates=20)
    lines = []
    again = cross_validate(configs, tmp_path, replicates=20, on_line=lines.append)
    assert again == first and lines == ["6 runs, 6 of them finished before"]


def test_folds_of_changed_data_are_not_mixed(configs, tmp_path, paired_data):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(paired_data, data)
    configs = {"one": dataclasses.replace(configs["slow"], data=str(data))}
    cross_validate(configs, tmp_path / "out", replicates=5)
    shutil.rmtree(tmp_path / "out/runs/one/repeat-0/fold-2")
    metadata = data / "HAM10000_metadata.csv"
    rows = metadata.read_text().splitlines()
    metadata.write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(SkinfastError, match="do not hold every image once, so the data changed"):
        cross_validate(configs, tmp_path / "out", replicates=5)


def test_models_must_meet_the_same_folds(configs, tmp_path):
    configs["fast"] = dataclasses.replace(configs["fast"], seed=1)
    with pytest.raises(SkinfastError, match="the same --data, --seed and --folds"):
        cross_validate(configs, tmp_path)
    with pytest.raises(SkinfastError, match="--repeats is 0"):
        cross_validate(configs, tmp_path, repeats=0)
    assert not any(tmp_path.iterdir())


def test_command(tmp_path, paired_data, capsys):
    arguments = ["cross-validate", "--model", "logistic-regression", "--data", str(paired_data),
                 "--image-size", "16", "--epochs", "1", "--folds", "2", "--preset", "paper",
                 "--output", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("2-fold cross-validation by lesion")
    assert "2 of 2: logistic-regression/repeat-0/fold-1: accuracy" in captured.err
    assert cli.main([*arguments, "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["models"]["logistic-regression"]["config"]
    assert config["beta2"] == 0.99 and config["epochs"] == 1 and config["split"] == "lesion"
    assert cli.main([*arguments, "--lr", "0.5"]) == 2
    assert "holds a run with --lr 0.001, not 0.5" in capsys.readouterr().err
