"""classification_metrics: hand-computed values, scikit-learn's, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import numpy as np
import numpy.typing as npt
import pytest
import sklearn.metrics
import torch

from skinfast.errors import SkinfastError
from skinfast.evaluation import classification_metrics

HAM10000_COUNTS = {
    "nv": 6705,
    "mel": 1113,
    "bkl": 1099,
    "bcc": 514,
    "akiec": 327,
    "vasc": 142,
    "df": 115,
}


def one_hot(classes: npt.ArrayLike, num_classes: int) -> npt.NDArray[np.float64]:
    return np.eye(num_classes)[np.asarray(classes)]


def random_case(
    seed: int, num_images: int = 200, num_classes: int = 5
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Skewed labels, and probabilities that know something of them; every class occurs."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(num_classes))
    labels = rng.choice(num_classes, size=num_images, p=shares)
    labels[:num_classes] = np.arange(num_classes)
    logits = rng.normal(size=(num_images, num_classes)) + 1.5 * one_hot(labels, num_classes)
    weights = np.exp(logits)
    return labels, weights / weights.sum(axis=1, keepdims=True)


def test_hand_computed() -> None:
    labels = [0, 0, 0, 1, 1]
    probabilities = [[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.1, 0.9], [0.55, 0.45]]
    metrics = classification_metrics(labels, probabilities, ["a", "b"])

    assert metrics["num_images"] == 5
    assert metrics["classes"] == ["a", "b"]
    assert metrics["confusion_matrix"] == [[2, 1], [1, 1]]
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["majority_accuracy"] == pytest.approx(3 / 5)
    assert metrics["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics["precision_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics["f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics["f1_weighted"] == pytest.approx(0.6 * 2 / 3 + 0.4 * 1 / 2)
    # Of the 6 pairs of an a and a b, only (0.3, 0.55) is in the wrong order.
    assert metrics["auc_macro"] == pytest.approx(5 / 6)
    assert metrics["loss"] == pytest.approx(-np.log([0.8, 0.6, 0.3, 0.9, 0.45]).mean())
    assert metrics["per_class"][1] == {
        "name": "b",
        "precision": pytest.approx(1 / 2),
        "recall": pytest.approx(1 / 2),
        "f1": pytest.approx(1 / 2),
        "auc": pytest.approx(5 / 6),
        "support": 2,
        "predicted": 2,
    }


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_sklearn_when_every_class_occurs(seed: int) -> None:
    labels, probabilities = random_case(seed)
    guess = probabilities.argmax(axis=1)
    metrics = classification_metrics(labels, probabilities, list("abcde"))

    def averaged(name: str, average: str) -> float:
        return getattr(sklearn.metrics, name)(labels, guess, average=average, zero_division=0)

    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, guess),
        "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(labels, guess),
        "f1_weighted": averaged("f1_score", "weighted"),
        "f1_macro": averaged("f1_score", "macro"),
        "precision_macro": averaged("precision_score", "macro"),
        "recall_macro": averaged("recall_score", "macro"),
        "auc_macro": sklearn.metrics.roc_auc_score(labels, probabilities, multi_class="ovr"),
        "loss": sklearn.metrics.log_loss(labels, probabilities),
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_macro_f1_is_bounded_by_macro_precision(seed: int) -> None:
    metrics = classification_metrics(*random_case(seed, num_images=40), list("abcde"))
    precision = metrics["precision_macro"]
    assert metrics["f1_macro"] <= 2 * precision / (1 + precision) + 1e-12


def test_perfect_predictor() -> None:
    labels = np.arange(7).repeat(3)
    metrics = classification_metrics(labels, one_hot(labels, 7), list(HAM10000_COUNTS))
    ones = ["accuracy", "balanced_accuracy", "f1_weighted", "f1_macro", "precision_macro"]
    assert [metrics[key] for key in [*ones, "recall_macro", "auc_macro"]] == [1.0] * 7
    assert metrics["loss"] == 0.0
    assert metrics["majority_accuracy"] == pytest.approx(1 / 7)
    assert metrics["confusion_matrix"] == (3 * np.eye(7, dtype=int)).tolist()


def test_always_answering_nv_on_ham10000() -> None:
    labels = np.arange(7).repeat(list(HAM10000_COUNTS.values()))
    always_nv = one_hot(np.zeros_like(labels), 7)
    metrics = classification_metrics(labels, always_nv, list(HAM10000_COUNTS))
    assert metrics["accuracy"] == pytest.approx(0.6695, abs=5e-5)
    assert metrics["majority_accuracy"] == metrics["accuracy"]
    assert metrics["f1_weighted"] == pytest.approx(0.537, abs=5e-4)
    assert metrics["balanced_accuracy"] == pytest.approx(1 / 7)
    assert metrics["precision_macro"] == pytest.approx(0.6695 / 7, abs=1e-5)
    assert metrics["auc_macro"] == 0.5


def test_absent_classes_stay_out_of_the_macro_averages() -> None:
    # c is predicted but never true, d neither: the averages run over a and b alone.
    labels = [0, 0, 1, 1]
    probabilities = one_hot([0, 2, 1, 1], 4)
    metrics = classification_metrics(labels, probabilities, list("abcd"))
    assert metrics["recall_macro"] == metrics["balanced_accuracy"] == pytest.approx(3 / 4)
    assert metrics["precision_macro"] == pytest.approx(1.0)
    assert metrics["f1_macro"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["auc_macro"] == pytest.approx((3 / 4 + 1) / 2)
    assert [c["auc"] for c in metrics["per_class"]] == [0.75, 1.0, None, None]
    assert [c["support"] for c in metrics["per_class"]] == [2, 2, 0, 0]
    assert [c["predicted"] for c in metrics["per_class"]] == [1, 2, 1, 0]


def test_one_class_only_has_no_auc_and_no_nan() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = classification_metrics([1, 1], [[0.9, 0.1], [0.2, 0.8]], ["a", "b"])
    assert metrics["auc_macro"] is None
    assert metrics["accuracy"] == 0.5
    json.dumps(metrics, allow_nan=False)


def test_a_certain_mistake_has_a_finite_loss() -> None:
    metrics = classification_metrics([0], [[0.0, 1.0]], ["a", "b"])
    assert metrics["loss"] == pytest.approx(87.3, abs=0.1)


def test_survives_a_trip_through_json() -> None:
    labels, probabilities = random_case(0)
    metrics = classification_metrics(labels, probabilities, tuple("abcde"))
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_takes_tensors(dtype: torch.dtype) -> None:
    labels, probabilities = random_case(0)
    narrow = torch.tensor(probabilities, dtype=dtype)
    from_numpy = classification_metrics(labels, narrow.double().numpy(), list("abcde"))
    from_torch = classification_metrics(
        torch.tensor(labels), narrow.requires_grad_(), list("abcde")
    )
    assert from_torch == from_numpy


HALF = [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0], [0.5, 0.5], r"probabilities have shape \[2\]: give \[N, 2\]"),
        ([0], [[0.2, 0.3, 0.5]], r"shape \[1, 3\]: give \[N, 2\], one column for each class"),
        ([0, 1], HALF, r"labels have shape \[2\]: give \[1\]"),
        ([[0]], HALF, r"labels have shape \[1, 1\]: give \[1\]"),
        ([], np.empty((0, 2)), "no predictions to measure: give at least one image"),
        ([0.0], HALF, "labels are float64: give class indices"),
        ([True], HALF, "labels are bool: give class indices"),
        ([-1], HALF, "labels run from -1 to -1: with 2 classes they must lie in 0 to 1"),
        ([2], HALF, "labels run from 2 to 2"),
        ([0], [[1, 0]], "probabilities are int64: give floating-point"),
        ([0, 0], [*HALF, [np.nan, 0.5]], "1 of 2 rows .* NaN or infinity, first row 1"),
        ([0], [[np.inf, 0.0]], "NaN or infinity"),
        ([0, 0], [*HALF, [3.0, -2.0]], "row 1 .* negative .* give softmax outputs, not logits"),
        ([0], [[0.5, 0.3]], "row 0 .* does not sum to 1"),
    ],
)
def test_refuses_in_one_line(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, message: str
) -> None:
    with pytest.raises(SkinfastError, match=message) as caught:
        classification_metrics(labels, probabilities, ["a", "b"])
    assert "\n" not in str(caught.value)


def test_importing_the_package_does_not_import_sklearn() -> None:
    program = "import sys, skinfast.evaluation; sys.exit('sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
