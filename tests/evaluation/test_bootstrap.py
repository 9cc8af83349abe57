"""The bootstrap: its metrics are those of scikit-learn, its draws are of whole lesions."""

import numpy as np
import pytest

from skinfast.errors import SkinfastError
from skinfast.evaluation import classification_metrics
from skinfast.evaluation.bootstrap import (
    METRICS,
    Answers,
    _weighted_metrics,
    bootstrap,
    difference,
    estimate,
    estimates,
    measure,
)

NAMES = [f"class{c}" for c in range(4)]


def answers(n=60, seed=0, photographs=1, present=4, skill=1.0, rounded=False):
    """N images of N / photographs lesions, those of a lesion alike."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(present, size=n // photographs)
    logits = skill * np.eye(4)[labels] + rng.normal(size=(len(labels), 4))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if rounded:  # many ties
        p = np.round(p, 1) + 0.01
        p /= p.sum(axis=1, keepdims=True)
    lesions = np.arange(len(labels)).repeat(photographs)
    return Answers(
        np.array([f"image{i:04}" for i in range(n)]),
        np.array([f"lesion{i:04}" for i in lesions]),
        labels.repeat(photographs),
        p.repeat(photographs, axis=0),
    )


def repeated(given, times):
    return classification_metrics(
        given.labels.repeat(times), given.probabilities.repeat(times, axis=0), NAMES
    )


@pytest.mark.parametrize("present", [4, 2, 1])
@pytest.mark.parametrize("rounded", [False, True])
def test_measure_agrees_with_classification_metrics(present, rounded):
    given = answers(present=present, rounded=rounded)
    expected = repeated(given, 1)
    assert measure([given]) == pytest.approx({name: expected[name] for name in METRICS})


@pytest.mark.parametrize("rounded", [False, True])
def test_weights_count_as_repetitions(rounded):
    given = answers(rounded=rounded)
    weights = np.random.default_rng(1).integers(0, 4, size=(5, 60))
    weights[2, given.labels == 3] = 0  # a class that is drawn in no image
    found = _weighted_metrics(given, weights.astype(float))
    for row, times in enumerate(weights):
        expected = repeated(given, times)
        for name in METRICS:
            assert found[name][row] == pytest.approx(expected[name]), name


def test_metrics_are_averaged_over_sets():
    one, other = answers(seed=1), answers(n=30, seed=2)
    both = measure([one, other])
    for name in METRICS:
        assert both[name] == pytest.approx((measure([one])[name] + measure([other])[name]) / 2)


def test_interval_of_accuracy_is_the_binomial_one():
    given = answers(n=800, skill=1.5)
    values, _ = estimates({"a": [given]}, replicates=2000)
    accuracy = values["a"]["accuracy"]
    half = 1.96 * np.sqrt(accuracy.value * (1 - accuracy.value) / 800)
    assert accuracy.low == pytest.approx(accuracy.value - half, abs=0.1 * half)
    assert accuracy.high == pytest.approx(accuracy.value + half, abs=0.1 * half)


def test_four_photographs_of_a_lesion_tell_no_more_than_one():
    many, one = answers(n=800, photographs=4), answers(n=200)
    wide, same = (
        np.std(bootstrap({"a": [given]}, replicates=1000)["a"]["accuracy"]) for given in (many, one)
    )
    as_if_independent = Answers(many.image_ids, many.image_ids, many.labels, many.probabilities)
    narrow = np.std(bootstrap({"a": [as_if_independent]}, replicates=1000)["a"]["accuracy"])
    assert wide == pytest.approx(same, rel=1e-9)
    assert wide == pytest.approx(2 * narrow, rel=0.1)


def test_draws_are_paired_and_follow_from_the_seed():
    good, bad = answers(skill=2.0), answers(skill=1.0)
    first = bootstrap({"good": [good], "bad": [bad]}, replicates=50, seed=3)
    again = bootstrap({"good": [good], "bad": [bad]}, replicates=50, seed=3)
    other = bootstrap({"good": [good], "bad": [bad]}, replicates=50, seed=4)
    for metric in METRICS:
        np.testing.assert_array_equal(first["good"][metric], again["good"][metric])
    assert not np.array_equal(first["good"]["accuracy"], other["good"]["accuracy"])
    values, drawn = estimates({"a": [good], "same": [good], "bad": [bad]}, replicates=200)
    zero = difference(values["a"], values["same"], drawn["a"], drawn["same"])
    gain = difference(values["a"], values["bad"], drawn["a"], drawn["bad"])
    for metric in METRICS:
        assert (zero[metric].value, zero[metric].low, zero[metric].high) == (0, 0, 0)
        assert gain[metric].value == pytest.approx(
            values["a"][metric].value - values["bad"][metric].value
        )
        assert gain[metric].low < gain[metric].value < gain[metric].high


def test_a_lesion_is_drawn_equally_often_in_every_set():
    given = answers(n=40)
    half = Answers(*(field[:20] for field in vars(given).values()))
    other_half = Answers(*(field[20:] for field in vars(given).values()))
    drawn = bootstrap({"all": [given], "half": [half], "rest": [other_half]}, replicates=20)
    # Were the draws separate, the parts would not add up to the whole in sign.
    whole = drawn["all"]["accuracy"]
    parts = np.stack([drawn["half"]["accuracy"], drawn["rest"]["accuracy"]])
    assert (whole <= parts.max(axis=0) + 1e-12).all()
    assert (whole >= parts.min(axis=0) - 1e-12).all()


def test_what_is_not_defined_is_none():
    given = answers(present=1)
    values, _ = estimates({"a": [given]}, replicates=10)
    assert values["a"]["auc_macro"].as_json() == {"value": None, "low": None, "high": None}
    assert estimate(0.5, np.full(3, np.nan)).value is None


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(SkinfastError, match="needs answers to draw from"):
        bootstrap({"a": []})
    with pytest.raises(SkinfastError, match="at least one replicate"):
        bootstrap({"a": [answers()]}, replicates=0)
