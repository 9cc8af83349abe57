from __future__ import annotations

import numpy as np
import pytest
import torch

from skinfast.data import CLASSES, HAM10000_COUNTS, class_weights, resample
from skinfast.errors import SkinfastError

LABELS = np.repeat(np.arange(7), [HAM10000_COUNTS[name] for name in CLASSES])
EVERY = np.arange(len(LABELS))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("none", [327, 514, 1099, 115, 1113, 6705, 142]),
        ("under", [327, 514, 1099, 115, 1113, 1113, 142]),
        ("over", [6705] * 7),
        ("both", [1431] * 7),
    ],
)
def test_class_sizes(method: str, expected: list[int]) -> None:
    chosen = resample(EVERY, LABELS, method)
    assert np.bincount(LABELS[chosen]).tolist() == expected
    assert chosen.dtype == np.int64
    assert np.all(np.diff(chosen) >= 0)


@pytest.mark.parametrize("method", ["none", "under", "over", "both"])
def test_only_given_indices_are_chosen(method: str) -> None:
    train = EVERY[::3]
    assert set(resample(train, LABELS, method)) <= set(train)


def test_filled_up_evenly_and_cut_without_repeats() -> None:
    times = np.bincount(resample(EVERY, LABELS, "over"), minlength=len(LABELS))
    for label in range(7):
        assert np.ptp(times[label == LABELS]) <= 1
    assert np.bincount(resample(EVERY, LABELS, "under")).max() == 1


def test_seeds() -> None:
    first, again, other = (resample(EVERY, LABELS, "both", seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("method", ["none", "under", "over", "both"])
def test_one_class_stays_as_it_is(method: str) -> None:
    assert resample([2, 0, 1], [3, 3, 3], method).tolist() == [0, 1, 2]


def test_refusals() -> None:
    with pytest.raises(SkinfastError, match="'smote'; choose one of none, under, over, both"):
        resample([0], [0], "smote")
    for indices in ([], [3], [-1]):
        with pytest.raises(SkinfastError, match="at least one index, each from 0 to 2"):
            resample(indices, [0, 1, 2], "over")


def test_class_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    weights = class_weights(LABELS)
    expected = compute_class_weight("balanced", classes=np.arange(7), y=LABELS)
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert weights[LABELS].mean().item() == pytest.approx(1, rel=1e-5)


def test_class_weights_of_absent_classes() -> None:
    assert class_weights([1, 1, 1, 4]).tolist() == pytest.approx([0, 2 / 3, 0, 0, 2, 0, 0])


@pytest.mark.parametrize("labels", [[], [7], [-1]])
def test_class_weights_refuse(labels: list[int]) -> None:
    with pytest.raises(SkinfastError, match="at least one label, each from 0 to 6"):
        class_weights(labels)
