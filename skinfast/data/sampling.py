"""Three ways to even out the classes of a training set, and weights that do it in the loss."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from skinfast.errors import SkinfastError

RESAMPLING_METHODS = ("none", "under", "over", "both")


def resample(
    indices: npt.ArrayLike, labels: npt.ArrayLike, method: str, seed: int = 0
) -> npt.NDArray[np.int64]:
    """Leave out or repeat training images so that the classes are less uneven.

    Give it a split's training indices, never the test set's. The methods, of which the paper
    tried the last three without giving sizes (in brackets, all of HAM10000):

    - ``"none"``: every image once.
    - ``"under"``: classes larger than the second-largest are cut to its size [nv 6705 -> 1113,
      the other six stay as they are].
    - ``"over"``: every class is filled up to the size of the largest [each 6705].
    - ``"both"``: every class is cut or filled up to the mean size, so that the whole stays as
      large as it was [each 10015 / 7, rounded: 1431].

    A class that is cut loses images drawn at random. A class that is filled up holds each of its
    images ``floor(target / size)`` times, and a random choice of them once more.

    Args:
        indices: integer ``[M]``, positions in ``labels``.
        labels: integer ``[N]``, of the whole dataset.
        method: one of ``RESAMPLING_METHODS``.
        seed: the same seed makes the same choice.

    Returns:
        int64, sorted; an index that is repeated stands there as often.

    Raises:
        SkinfastError: another method, no indices, or an index outside of ``labels``.
    """
    if method not in RESAMPLING_METHODS:
        raise SkinfastError(
            f"unknown resampling {method!r}; choose one of {', '.join(RESAMPLING_METHODS)}"
        )
    indices, labels = np.asarray(indices), np.asarray(labels)
    if not len(indices) or indices.min() < 0 or indices.max() >= len(labels):
        raise SkinfastError(
            f"resampling needs at least one index, each from 0 to {len(labels) - 1}; "
            "give a split's training indices"
        )
    generator = np.random.default_rng(seed)
    members = [indices[labels[indices] == label] for label in np.unique(labels[indices])]
    sizes = sorted(len(member) for member in members)
    if method == "under":
        second_largest = sizes[-2] if len(sizes) > 1 else sizes[-1]
        targets = [min(len(member), second_largest) for member in members]
    elif method == "over":
        targets = [sizes[-1]] * len(members)
    elif method == "both":
        targets = [round(len(indices) / len(members))] * len(members)
    else:
        targets = [len(member) for member in members]
    chosen = [
        np.concatenate(
            [
                np.repeat(member, target // len(member)),
                generator.choice(member, target % len(member), replace=False),
            ]
        )
        for member, target in zip(members, targets, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def class_weights(labels: npt.ArrayLike, num_classes: int = 7) -> torch.Tensor:
    """Weights for the loss, inverse to how often each class occurs: float32 ``[num_classes]``.

    Formula: ``weight[c] = N / (K * count[c])`` with K the number of classes that occur, which is
    scikit-learn's "balanced". The mean weight of the N samples is 1. A class that does not occur
    has weight 0.

    Args:
        labels: integer ``[N]``, of the training set.

    Raises:
        SkinfastError: no labels, or one outside of 0 .. num_classes - 1.
    """
    labels = np.asarray(labels)
    if not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise SkinfastError(
            f"class weights need at least one label, each from 0 to {num_classes - 1}; "
            "give the training set's labels"
        )
    counts = np.bincount(labels, minlength=num_classes)
    present = counts > 0
    weights = np.zeros(num_classes)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return torch.from_numpy(weights).float()
