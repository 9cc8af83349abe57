"""Intervals of test metrics: a bootstrap that draws whole lesions, not images.

Photographs of one lesion resemble each other, so drawing images one by one would take them for
independent and make the intervals too narrow (Field and Welsh, 2007, the cluster bootstrap).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from skinfast.errors import SkinfastError

Array = npt.NDArray[np.float64]

#: What is measured, by the names of ``classification_metrics``.
METRICS = (
    "accuracy",
    "balanced_accuracy",
    "f1_weighted",
    "f1_macro",
    "precision_macro",
    "auc_macro",
)
# Replicates at once: with all of HAM10000 out of fold an array of them is 8 MB.
_CHUNK = 100


@dataclass(frozen=True)
class Answers:
    """What a model said of N images.

    Attributes:
        image_ids: N names.
        lesion_ids: N names, equal for photographs of one lesion.
        labels: int64 ``[N]``, the true classes.
        probabilities: float ``[N, C]``.
    """

    image_ids: npt.NDArray[Any]
    lesion_ids: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95% interval, both None where the metric is not defined."""

    value: float | None
    low: float | None
    high: float | None

    def as_json(self) -> dict[str, float | None]:
        """``{"value", "low", "high"}``."""
        return {"value": self.value, "low": self.low, "high": self.high}


def measure(sets: Sequence[Answers]) -> dict[str, float | None]:
    """``METRICS`` of each set of answers, averaged over the sets; None where none has it."""
    each = [_weighted_metrics(answers, np.ones((1, len(answers.labels)))) for answers in sets]
    means = {name: _mean_over_sets([values[name] for values in each])[0] for name in METRICS}
    return {name: None if np.isnan(mean) else float(mean) for name, mean in means.items()}


def bootstrap(
    groups: Mapping[str, Sequence[Answers]], *, replicates: int = 1000, seed: int = 0
) -> dict[str, dict[str, Array]]:
    """``METRICS`` of every group when the lesions are drawn again, with replacement.

    A group is one model's answers: one set for each seed or repeat, whose metrics are averaged. In
    a replicate a lesion is there equally often in every set of every group that shows it. So the
    difference of two groups' values, replicate by replicate, is a paired comparison.

    Args:
        groups: name to sets of answers.
        replicates: R, how often the lesions are drawn.
        seed: the same seed draws the same lesions.

    Returns:
        For each group and metric float64 ``[R]``; NaN where a replicate does not define it.

    Raises:
        SkinfastError: there are no answers, or fewer than one replicate.
    """
    if replicates < 1 or not any(len(a.labels) for sets in groups.values() for a in sets):
        raise SkinfastError("a bootstrap needs answers to draw from and at least one replicate")
    lesions = np.unique([name for sets in groups.values() for a in sets for name in a.lesion_ids])
    columns = {
        name: [np.searchsorted(lesions, answers.lesion_ids) for answers in sets]
        for name, sets in groups.items()
    }
    drawn: dict[str, dict[str, list[Array]]] = {n: {m: [] for m in METRICS} for n in groups}
    for counts in _draws(len(lesions), replicates, np.random.default_rng(seed)):
        for name, sets in groups.items():
            each = [
                _weighted_metrics(answers, counts[:, column])
                for answers, column in zip(sets, columns[name], strict=True)
            ]
            for metric in METRICS:
                drawn[name][metric].append(_mean_over_sets([values[metric] for values in each]))
    return {
        name: {metric: np.concatenate(parts) for metric, parts in by_metric.items()}
        for name, by_metric in drawn.items()
    }


def estimate(value: float | None, replicates: Array) -> Estimate:
    """A value with the 2.5 and 97.5 percentiles of its replicates (the percentile interval)."""
    defined = replicates[~np.isnan(replicates)]
    if value is None or not len(defined):
        return Estimate(None, None, None)
    low, high = np.quantile(defined, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


def estimates(
    groups: Mapping[str, Sequence[Answers]], *, replicates: int = 1000, seed: int = 0
) -> tuple[dict[str, dict[str, Estimate]], dict[str, dict[str, Array]]]:
    """Every metric of every group with its interval, and the replicates of ``bootstrap``."""
    drawn = bootstrap(groups, replicates=replicates, seed=seed)
    return {
        name: {metric: estimate(value, drawn[name][metric]) for metric, value in measured.items()}
        for name, measured in ((name, measure(sets)) for name, sets in groups.items())
    }, drawn


def difference(
    first: Mapping[str, Estimate],
    second: Mapping[str, Estimate],
    first_drawn: Mapping[str, Array],
    second_drawn: Mapping[str, Array],
) -> dict[str, Estimate]:
    """Every metric of the first group less that of the second, paired replicate by replicate."""
    result = {}
    for metric in METRICS:
        one, other = first[metric].value, second[metric].value
        value = None if one is None or other is None else one - other
        result[metric] = estimate(value, first_drawn[metric] - second_drawn[metric])
    return result


def _draws(
    num_lesions: int, replicates: int, generator: np.random.Generator
) -> Iterator[npt.NDArray[np.float64]]:
    """How often each lesion is drawn, ``[chunk, num_lesions]`` at a time."""
    equal = np.full(num_lesions, 1 / num_lesions)
    for start in range(0, replicates, _CHUNK):
        size = min(_CHUNK, replicates - start)
        yield generator.multinomial(num_lesions, equal, size=size).astype(np.float64)


def _mean_over_sets(values: Sequence[Array]) -> Array:
    """The mean over the sets that define the metric, ``[R]``; NaN where none does."""
    stacked = np.stack(values)
    defined = ~np.isnan(stacked)
    total = np.where(defined, stacked, 0).sum(axis=0)
    return np.where(defined.any(axis=0), total / np.maximum(defined.sum(axis=0), 1), np.nan)


def _weighted_metrics(answers: Answers, weights: Array) -> dict[str, Array]:
    """``classification_metrics`` for R weightings of the images at once, ``[R, N]`` to ``[R]``.

    A call of scikit-learn for each replicate would take minutes; a test holds this against it.
    """
    y, p = answers.labels, np.asarray(answers.probabilities, dtype=np.float64)
    num_classes = p.shape[1]
    cell = y * num_classes + p.argmax(axis=1)
    one_hot = np.eye(num_classes**2)[cell]
    confusion = (weights @ one_hot).reshape(-1, num_classes, num_classes)
    right = np.diagonal(confusion, axis1=1, axis2=2)
    support, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
    present = support > 0
    recall, precision, f1 = (
        np.divide(above, below, out=np.zeros_like(right), where=below > 0)
        for above, below in (
            (right, support),
            (right, predicted),
            (2 * right, support + predicted),
        )
    )
    auc = np.stack([_weighted_auc(y == c, p[:, c], weights) for c in range(num_classes)], axis=1)
    total = support.sum(axis=1)
    # A replicate may have drawn none of a set's lesions: then nothing is defined.
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "accuracy": right.sum(axis=1) / total,
            "balanced_accuracy": recall.sum(axis=1) / present.sum(axis=1),
            "f1_weighted": (f1 * support).sum(axis=1) / total,
            # A class that does not occur has no say, as in classification_metrics.
            "f1_macro": (f1 * present).sum(axis=1) / present.sum(axis=1),
            "precision_macro": (precision * present).sum(axis=1) / present.sum(axis=1),
            "auc_macro": _mean_over_sets(list(auc.T)),
        }


def _weighted_auc(positive: npt.NDArray[np.bool_], score: Array, weights: Array) -> Array:
    """Area under the ROC curve for R weightings, ``[R]``; NaN where one of the two is missing.

    The Mann-Whitney statistic: the weight of the pairs that are ranked rightly, a tie as half.
    """
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    weights = weights[:, order]
    above = np.add.reduceat(weights * positive[order], starts, axis=1)
    below = np.add.reduceat(weights * ~positive[order], starts, axis=1)
    ranked = (above * (np.cumsum(below, axis=1) - below / 2)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ranked / (above.sum(axis=1) * below.sum(axis=1))
