"""Training and test sets as indices: by image, as the paper did, and by lesion, the honest way."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from skinfast.data.classes import CLASSES
from skinfast.errors import SkinfastError

if TYPE_CHECKING:
    from skinfast.data.dataset import LesionDataset

SPLIT_KINDS = ("image", "lesion")


@dataclass(frozen=True)
class Split:
    """Two disjoint sets of indices, int64, sorted, together every image once."""

    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


def make_split(
    dataset: LesionDataset, kind: str, seed: int = 0, *, num_folds: int = 5, fold: int = 0
) -> Split:
    """Split ``dataset`` 80/20 by ``"image"``, or by ``"lesion"`` with one of the folds as test set.

    Raises:
        SkinfastError: another kind, a dataset without lesion ids split by lesion, or too few
            images.
    """
    labels = dataset.labels.numpy()
    if kind == "image":
        return split_by_image(labels, seed=seed)
    if kind == "lesion":
        return split_by_lesion(labels, dataset.groups(), 1 / num_folds, seed, fold)
    raise SkinfastError(f"unknown split {kind!r}; choose {' or '.join(SPLIT_KINDS)}")


def split_by_image(labels: npt.ArrayLike, test_fraction: float = 0.2, seed: int = 0) -> Split:
    """Draw ``ceil(test_fraction * N)`` images for the test set, whatever lesion they show.

    This is the paper's split: 8,012 and 2,003 of 10,015. The paper says no more than "80% and
    20%"; here the draw is stratified, each class in its proportion, so that the rare classes are
    in every test set. Photographs of one lesion fall on both sides, so test results flatter.

    Args:
        labels: integer ``[N]``.
        test_fraction: between 0 and 1.
        seed: the same seed makes the same split.

    Raises:
        SkinfastError: a fraction out of range, a class with one image, or a training or test set
            with fewer images than there are classes.
    """
    from sklearn.model_selection import train_test_split  # slow to import

    labels = _checked_labels(labels, test_fraction)
    present, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        lonely = CLASSES[present[counts.argmin()]]
        raise SkinfastError(
            f"class {lonely} has 1 image, so it cannot be in both the training and the test set; "
            "add images of it or leave the class out"
        )
    num_test = math.ceil(test_fraction * len(labels))
    if min(num_test, len(labels) - num_test) < len(present):
        raise SkinfastError(
            f"{len(labels)} images are too few to put every one of {len(present)} classes into "
            f"a training set of {len(labels) - num_test} and a test set of {num_test}; "
            "add images or change the test fraction"
        )
    train, test = train_test_split(
        np.arange(len(labels)), test_size=num_test, random_state=seed, stratify=labels
    )
    return Split(np.sort(train), np.sort(test))


def split_by_lesion(
    labels: npt.ArrayLike,
    groups: npt.ArrayLike,
    test_fraction: float = 0.2,
    seed: int = 0,
    fold: int = 0,
) -> Split:
    """Take one of k folds of lesions as the test set: no lesion is on both sides.

    The folds are scikit-learn's ``StratifiedGroupKFold``, shuffled, with k = 1 / test_fraction:
    whole lesions, each class as near to its proportion as they allow. The test sets of all k folds
    hold every image once.

    Args:
        labels: integer ``[N]``.
        groups: the lesion of each image, integer ``[N]``.
        test_fraction: 1/k for a whole k of at least 2, such as 0.5, 0.25, 0.2, 0.1.
        seed: the same seed makes the same folds.
        fold: which of the folds, from 0 to k - 1.

    Raises:
        SkinfastError: a fraction that is no 1/k, a fold that is not there, as many labels as
            groups not given, or a training or test set that would be empty.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # slow to import

    labels = _checked_labels(labels, test_fraction)
    groups = np.asarray(groups)
    if groups.shape != labels.shape:
        raise SkinfastError(
            f"groups are {list(groups.shape)}, labels {list(labels.shape)}; give one for each image"
        )
    num_folds = round(1 / test_fraction)
    if num_folds < 2 or not math.isclose(num_folds * test_fraction, 1.0, rel_tol=1e-6):
        raise SkinfastError(
            f"test fraction {test_fraction} is not 1/k; by lesion choose 0.5, 0.25, 0.2 or 0.1"
        )
    if not 0 <= fold < num_folds:
        raise SkinfastError(f"fold is {fold}; there are folds 0 to {num_folds - 1}")
    num_lesions = len(np.unique(groups))
    if num_lesions < num_folds or np.bincount(labels).max() < num_folds:
        raise SkinfastError(
            f"{num_lesions} lesions in {len(labels)} images are too few for {num_folds} folds: "
            "the training or test set would be empty; add images or split by image"
        )
    folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer images than folds is missing from some of them; one fold is used here.
        warnings.filterwarnings("ignore", message="The least populated class")
        train, test = next(itertools.islice(folds.split(labels, labels, groups), fold, None))
    if not len(train) or not len(test):
        raise SkinfastError(
            f"the {'test' if len(train) else 'training'} set is empty: "
            f"{num_lesions} lesions are too few; add images or split by image"
        )
    return Split(np.sort(train), np.sort(test))


def _checked_labels(labels: npt.ArrayLike, test_fraction: float) -> npt.NDArray[np.int64]:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise SkinfastError(
            f"labels are {labels.dtype} {list(labels.shape)}; give at least one, integer [N]"
        )
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise SkinfastError(f"labels must be from 0 to {len(CLASSES) - 1}")
    if not 0 < test_fraction < 1:
        raise SkinfastError(f"test fraction {test_fraction}: choose one between 0 and 1")
    return labels.astype(np.int64)
