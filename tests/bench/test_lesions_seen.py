"""bench/lesions_seen.py tells images of lesions that trained from the others."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from skinfast.errors import SkinfastError
from skinfast.evaluation.bootstrap import Answers

BENCH = Path(__file__).resolve().parents[2] / "bench"
LESIONS = np.array(["a", "a", "b", "c"])
# The first model is right on every image of a, the second on those of b and c.
FIRST, SECOND = np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0])


def outcome(model, predicted, image_ids=("1", "2", "3", "4")):
    probabilities = np.eye(2)[predicted]
    answers = Answers(np.array(image_ids), LESIONS, np.zeros(4, np.int64), probabilities)
    return SimpleNamespace(config=SimpleNamespace(model=model), answers=answers)


@pytest.fixture
def print_of(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("lesions_seen")
    dataset = SimpleNamespace(lesion_ids=["a", "d", "b"])
    monkeypatch.setattr(
        module, "prepare", lambda _: SimpleNamespace(dataset=dataset, train_indices=[0, 1])
    )

    def run(*outcomes):
        monkeypatch.setattr(module, "read_outcome", dict(zip("xy", outcomes, strict=True)).get)
        monkeypatch.setattr("sys.argv", ["", "x", "y"])
        module.main()
        return capsys.readouterr().out

    return run


def test_a_lesion_counts_as_seen_where_an_image_of_it_trains(print_of):
    _, _, seen, new = print_of(outcome("cnn", FIRST), outcome("resnet50", SECOND)).splitlines()
    ones, zeros = "1.000 [1.000, 1.000]", "0.000 [0.000, 0.000]"
    assert seen.split(" | ")[1:4] == ["2", ones, zeros]
    assert new.split(" | ")[1:4] == ["2", zeros, ones]
    assert "+1.000" in seen and "-1.000" in new


def test_runs_of_other_images_or_of_one_model_are_refused(print_of):
    with pytest.raises(SkinfastError, match="one model"):
        print_of(outcome("cnn", FIRST), outcome("cnn", SECOND))
    with pytest.raises(SkinfastError, match="other test images"):
        print_of(outcome("cnn", FIRST), outcome("resnet50", SECOND, ("1", "2", "3", "5")))
