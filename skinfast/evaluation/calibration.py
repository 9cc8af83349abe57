"""How far probabilities can be believed: calibration error, abstention, one temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from skinfast.errors import SkinfastError

NUM_BINS = 15
_RESAMPLES = 1000
# Of the images: at these shares the table of answers and abstentions is read off.
_COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
# A temperature at one of these ends means that the probabilities say nothing.
TEMPERATURE_RANGE = (0.05, 20.0)
_TINY = float(np.finfo(np.float32).tiny)

Floats = npt.NDArray[np.float64]


def calibration_figures(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    class_names: Sequence[str],
    *,
    groups: npt.ArrayLike | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure how well confidence, the largest probability of a row, foretells being right.

    The interval is the *basic* bootstrap's, ``[2e - q97.5, 2e - q2.5]`` cut at 0, for e the
    measured error: noise only ever adds to a calibration error, to a resampled one twice, and the
    basic interval takes that out again where the percentile interval leaves it in (for a
    calibrated model it would never reach down to 0). It is still no 95% interval: docs/analysis.md
    has in how many of simulated models it held the truth. Whole groups are resampled, since
    photographs of one lesion are not independent.

    Args:
        labels: true classes, integer ``[N]``; N at least 1.
        probabilities: ``[N, C]``, rows summing to 1.
        class_names: the C names.
        groups: the lesion of each image, ``[N]``; None takes every image for itself.
        seed: of the resampling.

    Returns:
        For JSON: ``expected_calibration_error`` (Guo et al. 2017, equation 5, 15 bins of equal
        width), ``interval`` (nominally 95%, two floats), ``expected_if_calibrated`` (the error that
        sampling noise alone would show at these confidences), ``mean_confidence``, ``accuracy``,
        ``loss`` (mean negative log likelihood in nats), ``num_images``, ``bins`` (those with
        images: ``confidence``, ``accuracy``, ``count``) and ``risk_coverage`` (see
        ``risk_coverage``).

    Source: Guo et al., "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599
    """
    y, p = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    confidence, right = p.max(axis=1), (p.argmax(axis=1) == y).astype(np.float64)
    bins = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gap = right - confidence
    error = _calibration_error(gap[None], bins)[0]
    generator = np.random.default_rng(seed)
    low, high = np.quantile(_resampled_errors(gap, bins, groups, generator), [0.025, 0.975])
    chance = (generator.random((_RESAMPLES // 5, len(y))) < confidence) - confidence
    counts = np.bincount(bins, minlength=NUM_BINS)
    return {
        "num_images": len(y),
        "loss": float(-np.log(p[np.arange(len(y)), y].clip(_TINY, 1.0)).mean()),
        "accuracy": float(right.mean()),
        "mean_confidence": float(confidence.mean()),
        "expected_calibration_error": float(error),
        "interval": [float(max(0.0, 2 * error - high)), float(max(0.0, 2 * error - low))],
        "expected_if_calibrated": float(_calibration_error(chance, bins).mean()),
        "bins": [
            {
                "confidence": float(confidence[bins == b].mean()),
                "accuracy": float(right[bins == b].mean()),
                "count": int(counts[b]),
            }
            for b in np.flatnonzero(counts)
        ],
        "risk_coverage": risk_coverage(y, p, class_names),
    }


def _calibration_error(gaps: Floats, bins: npt.NDArray[np.int64]) -> Floats:
    """For rows of gaps ``[R, N]``: the sum over bins of |sum of gaps|, over N; ``[R]``."""
    sums = np.stack([gaps[:, bins == b].sum(axis=1) for b in range(NUM_BINS)])
    return np.asarray(abs(sums).sum(axis=0) / gaps.shape[1])


def _resampled_errors(
    gap: Floats,
    bins: npt.NDArray[np.int64],
    groups: npt.ArrayLike | None,
    generator: np.random.Generator,
) -> Floats:
    """The calibration errors of bootstrap samples of whole groups, ``[_RESAMPLES]``."""
    named = np.arange(len(gap)) if groups is None else np.asarray(groups)
    _, group = np.unique(named, return_inverse=True)
    num_groups = int(group.max()) + 1
    # Sums for each group and bin: a sample is then one row of counts times this matrix.
    sums, sizes = np.zeros((num_groups, NUM_BINS)), np.bincount(group).astype(np.float64)
    np.add.at(sums, (group, bins), gap)
    errors = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        drawn = generator.integers(num_groups, size=num_groups)
        times = np.bincount(drawn, minlength=num_groups).astype(np.float64)
        errors[i] = abs(times @ sums).sum() / (times @ sizes)
    return errors


def risk_coverage(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """What a model that stays silent where it is unsure gets right of what it answers.

    Each row answers the images of highest confidence, as many as its share ``coverage`` asks for.

    Returns:
        Rows of ``coverage``, ``threshold`` (the least confidence answered), ``accuracy`` and
        ``balanced_accuracy`` of the answers (None where a class that has images gets no answer at
        all: the mean over those left would flatter), and ``answered``, the share of each class's
        images that gets an answer (None for a class without images). Accuracy that rises while
        the share of melanomas falls is no gain: hence the last two.

    Source: El-Yaniv and Wiener, "On the Foundations of Noise-free Selective Classification",
    Journal of Machine Learning Research 11 (2010).
    """
    y, p = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y
    # Stable: equal confidences keep their order, so that the rows follow from the input alone.
    order = np.argsort(-confidence, kind="stable")
    rows = []
    for coverage in _COVERAGES:
        kept = order[: max(1, round(coverage * len(y)))]
        answered = [
            float(np.isin(np.flatnonzero(y == c), kept).mean()) if (y == c).any() else None
            for c in range(len(class_names))
        ]
        recalls = [right[kept][y[kept] == c].mean() for c in np.unique(y[kept])]
        rows.append(
            {
                "coverage": coverage,
                "threshold": float(confidence[kept].min()),
                "accuracy": float(right[kept].mean()),
                "balanced_accuracy": None if 0 in answered else float(np.mean(recalls)),
                "answered": dict(zip(class_names, answered, strict=True)),
            }
        )
    return rows


def fit_temperature(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """The temperature T at which ``softmax(logits / T)`` makes ``labels`` likeliest.

    Logits are known from probabilities up to a constant, which the softmax ignores.

    Args:
        labels: integer ``[N]``.
        probabilities: ``[N, C]``, of images that did not train the model.

    Returns:
        T above 1 where the model is too sure of itself, below 1 where it is too timid.

    Raises:
        SkinfastError: no temperature from 0.05 to 20 is best: the probabilities carry no
            information, or every answer is right.

    Source: Guo et al. (2017), section 4.2.
    """
    from scipy.optimize import minimize_scalar

    y, p = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)

    def loss(log_temperature: float) -> float:
        scaled = with_temperature(p, float(np.exp(log_temperature)))
        return float(-np.log(scaled[np.arange(len(y)), y].clip(_TINY, 1.0)).mean())

    # The loss is convex in 1 / T, so it has one minimum in log T too.
    bounds = np.log(TEMPERATURE_RANGE)
    found = minimize_scalar(loss, bounds=tuple(bounds), method="bounded", options={"xatol": 1e-6})
    if min(loss(end) for end in bounds) <= found.fun:
        raise SkinfastError(
            f"no temperature from {TEMPERATURE_RANGE[0]} to {TEMPERATURE_RANGE[1]:g} fits these "
            "predictions best: the model's answers are all right, or they say nothing; "
            "train longer, or give more test images"
        )
    return float(np.exp(found.x))


def with_temperature(probabilities: npt.ArrayLike, temperature: float) -> Floats:
    """``softmax(log(probabilities) / temperature)``, float64 ``[N, C]``."""
    scores = np.log(np.asarray(probabilities, dtype=np.float64).clip(_TINY, 1.0)) / temperature
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
