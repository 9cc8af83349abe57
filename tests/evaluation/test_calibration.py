"""Calibration against worked examples, simulations with known truth, and sums done by hand."""

import numpy as np
import pytest

from skinfast.errors import SkinfastError
from skinfast.evaluation import calibration_figures
from skinfast.evaluation.calibration import fit_temperature, risk_coverage, with_temperature

NAMES = ["a", "b", "c"]


def predictions(num_images, sharpness, seed=0):
    """Labels drawn from softmax(z), and softmax(sharpness * z): calibrated at sharpness 1."""
    generator = np.random.default_rng(seed)
    truth = with_temperature(np.exp(1.5 * generator.normal(size=(num_images, 3))), 1.0)
    labels = (generator.random((num_images, 1)) > truth.cumsum(axis=1)).sum(axis=1)
    return labels, with_temperature(truth, 1 / sharpness)


def test_error_of_a_worked_example():
    # Bin of 0.9: two of four right; bin of 0.5: one of one right, so (4 * 0.4 + 0.5) / 5.
    p = np.array([[0.9, 0.1, 0.0]] * 4 + [[0.5, 0.3, 0.2]])
    figures = calibration_figures([0, 0, 1, 1, 0], p, NAMES)
    assert figures["expected_calibration_error"] == pytest.approx(0.42)
    assert [b["count"] for b in figures["bins"]] == [1, 4]
    assert figures["bins"][1] == {
        "confidence": pytest.approx(0.9),
        "accuracy": 0.5,
        "count": 4,
    }
    assert figures["accuracy"] == pytest.approx(0.6)
    assert figures["mean_confidence"] == pytest.approx(0.82)
    assert figures["loss"] == pytest.approx(-np.log([0.9, 0.9, 0.1, 0.1, 0.5]).mean())


def test_interval_holds_the_truth_where_the_model_is_too_sure():
    held = 0
    true_error = calibration_figures(*predictions(200_000, 2.0, seed=999), NAMES)
    for seed in range(30):
        low, high = calibration_figures(*predictions(800, 2.0, seed), NAMES)["interval"]
        held += low <= true_error["expected_calibration_error"] <= high
    assert held >= 25


def test_noise_floor_is_the_error_of_a_calibrated_model():
    measured = [
        calibration_figures(*predictions(500, 1.0, seed), NAMES)["expected_calibration_error"]
        for seed in range(30)
    ]
    floor = calibration_figures(*predictions(500, 1.0), NAMES)["expected_if_calibrated"]
    assert floor == pytest.approx(np.mean(measured), rel=0.15)


def test_dependent_images_widen_the_interval():
    labels, p = predictions(400, 2.0)
    groups = np.arange(400).repeat(5)
    many = labels.repeat(5), p.repeat(5, axis=0), NAMES
    low, high = calibration_figures(*many, groups=groups)["interval"]
    naive_low, naive_high = calibration_figures(*many)["interval"]
    assert high - low > 1.7 * (naive_high - naive_low)  # sqrt(5), were there no rounding at 0
    assert (low, high) == tuple(calibration_figures(*many, groups=groups)["interval"])


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_temperature_undoes_sharpness(sharpness):
    labels, p = predictions(20_000, sharpness)
    temperature = fit_temperature(labels, p)
    assert temperature == pytest.approx(sharpness, rel=0.05)
    after = calibration_figures(labels, with_temperature(p, temperature), NAMES)
    assert after["expected_calibration_error"] < 2 * after["expected_if_calibrated"]


def test_temperature_keeps_the_order_of_classes_and_the_sum():
    _, p = predictions(100, 1.0)
    scaled = with_temperature(p.astype(np.float32), 2.5)
    np.testing.assert_array_equal(scaled.argsort(axis=1), p.argsort(axis=1))
    np.testing.assert_allclose(scaled.sum(axis=1), 1)
    np.testing.assert_allclose(with_temperature(p, 1.0), p)
    np.testing.assert_array_equal(with_temperature([[1.0, 0.0, 0.0]], 0.05), [[1, 0, 0]])


def test_no_temperature_fits_answers_that_are_all_right():
    with pytest.raises(SkinfastError, match=r"no temperature from 0.05 to 20 fits .* train longer"):
        fit_temperature([0, 1], [[0.9, 0.05, 0.05], [0.1, 0.8, 0.1]])


def test_abstention_answers_the_surest_first():
    confidence = np.array([0.9, 0.5, 0.8, 0.6, 0.95, 0.7, 0.55, 0.65, 0.75, 0.85])
    p = np.stack([confidence, 1 - confidence, 0 * confidence], axis=1)
    labels = np.array([0, 1, 0, 1, 0, 0, 1, 1, 1, 0])
    rows = {row["coverage"]: row for row in risk_coverage(labels, p, NAMES)}
    assert rows[1.0]["accuracy"] == 0.5 and rows[1.0]["threshold"] == 0.5
    assert rows[1.0]["answered"] == {"a": 1.0, "b": 1.0, "c": None}
    # The surest five: 0.95, 0.9, 0.85, 0.8 right, 0.75 wrong.
    assert rows[0.5]["accuracy"] == 0.8 and rows[0.5]["threshold"] == 0.75
    assert rows[0.5]["balanced_accuracy"] == 0.5
    # The surest three are all of class a: no balanced accuracy without an answer for b.
    assert rows[0.3]["accuracy"] == 1.0 and rows[0.3]["balanced_accuracy"] is None
    assert rows[0.5]["answered"] == {"a": 0.8, "b": pytest.approx(0.2), "c": None}
