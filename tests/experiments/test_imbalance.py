"""Class imbalance: every method is what it says, and the table holds what was measured."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from skinfast import cli
from skinfast.data import CLASSES
from skinfast.errors import SkinfastError
from skinfast.evaluation.bootstrap import Answers
from skinfast.experiments import compare_imbalance_methods
from skinfast.experiments.imbalance import METHODS, melanoma_recall

MELANOMA = CLASSES.index("mel")


def scored(labels, scores):
    """Answers in which ``scores`` are the probabilities of melanoma."""
    probabilities = np.repeat(((1 - np.array(scores)) / 6)[:, None], 7, axis=1)
    probabilities[:, MELANOMA] = scores
    names = np.array([str(i) for i in range(len(labels))])
    return Answers(names, names, np.array(labels), probabilities)


def test_melanoma_recall_is_that_of_the_best_threshold_that_keeps_the_specificity():
    rng = np.random.default_rng(0)
    is_melanoma = rng.random(400) < 0.3
    scores = np.clip(0.3 + 0.2 * is_melanoma + 0.15 * rng.normal(size=400), 0, 1).round(2)
    answers = scored(np.where(is_melanoma, MELANOMA, 5), scores)
    for specificity in (0.9, 0.95):
        best = 0.0
        for threshold in np.unique(scores):
            (tn, fp), (fn, tp) = confusion_matrix(is_melanoma, scores >= threshold)
            if tn / (tn + fp) >= specificity:
                best = max(best, tp / (tp + fn))
        assert 0 < best < 1
        assert melanoma_recall([answers], specificity) == pytest.approx(best)


def test_melanoma_recall_at_the_very_point():
    # Ten others, one of them above: exactly 90% specificity, and all melanomas found.
    labels = [5] * 10 + [MELANOMA] * 2
    scores = [0.1] * 9 + [0.9] + [0.5, 0.6]
    assert melanoma_recall([scored(labels, scores)], 0.9) == 1.0
    assert melanoma_recall([scored(labels, scores)], 0.95) == 0.0
    assert melanoma_recall([scored([5, 5], [0.1, 0.2])], 0.9) is None


def test_every_method_is_trained_and_measured(config, tmp_path):
    content = compare_imbalance_methods({"lr": config}, tmp_path, seeds=2, replicates=20)
    assert [row["method"] for row in content["rows"]] == list(METHODS)
    by_method = {row["method"]: row for row in content["rows"]}
    assert by_method["none"]["config"] == dataclasses.asdict(config)
    assert by_method["both"]["config"]["sampling"] == "both"
    assert by_method["class weights"]["config"]["class_weights"] is True
    assert by_method["focal loss"]["config"]["loss"] == "focal"
    assert by_method["balanced batches"]["config"]["balanced_batches"] is True
    losses = set()
    for method, row in by_method.items():
        seeds = [
            json.loads(
                (
                    tmp_path / f"runs/lr/{method.replace(' ', '-')}/seed-{seed}/result.json"
                ).read_text()
            )
            for seed in (0, 1)
        ]
        mean = np.mean([result["f1_macro"] for result in seeds])
        assert row["metrics"]["f1_macro"]["value"] == pytest.approx(mean)
        assert 0 <= row["melanoma_recall"]["0.95"] <= row["melanoma_recall"]["0.90"] <= 1
        assert row["commits"] == sorted({str(r["environment"].get("commit")) for r in seeds})
        losses.add(seeds[0]["loss"])
    assert len(losses) == len(METHODS)  # no two are the same training
    text = (tmp_path / "imbalance.md").read_text()
    assert text.count("\n| lr |") == 7 and "melanoma recall at 95% specificity" in text


def test_bad_number_of_seeds(config, tmp_path):
    with pytest.raises(SkinfastError, match="--seeds is 0"):
        compare_imbalance_methods({"lr": config}, tmp_path, seeds=0)


def test_command_splits_by_lesion_unless_told_otherwise(tmp_path, paired_data, capsys):
    arguments = ["imbalance", "--model", "logistic-regression", "--data", str(paired_data),
                 "--image-size", "16", "--epochs", "1",
                 "--output", str(tmp_path / "out")]  # fmt: skip
    assert cli.main([*arguments, "--json"]) == 0
    assert {r["config"]["split"] for r in json.loads(capsys.readouterr().out)["rows"]} == {"lesion"}
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Test images of a split by lesion; each figure is one training")
    assert captured.err == "7 runs, 7 of them finished before\n"
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--class-weights"])


@pytest.mark.parametrize(("given", "split"), [([], "lesion"), (["--split", "image"], "image")])
def test_preset_does_not_choose_the_split(tmp_path, monkeypatch, given, split):
    class ReadError(Exception):
        pass

    def read(configs, *_, **__):
        raise ReadError({name: (c.split, c.beta2) for name, c in configs.items()})

    monkeypatch.setattr("skinfast.experiments.compare_imbalance_methods", read)
    with pytest.raises(ReadError) as seen:
        cli.main(["imbalance", "--model", "cnn", "resnet50", "--preset", "paper", *given,
                  "--output", str(tmp_path / "out")])  # fmt: skip
    assert seen.value.args == ({"cnn": (split, 0.99), "resnet50": (split, 0.99)},)
