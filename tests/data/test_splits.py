from __future__ import annotations

import numpy as np
import pytest
import torch

from skinfast.data import (
    CLASSES,
    HAM10000_COUNTS,
    LesionDataset,
    Split,
    make_split,
    split_by_image,
    split_by_lesion,
)
from skinfast.errors import SkinfastError

HAM_LABELS = np.repeat(np.arange(7), [HAM10000_COUNTS[name] for name in CLASSES])
SMALL_LABELS = np.repeat(np.arange(7), [8, 12, 25, 7, 26, 150, 9])
# Two photographs of every second lesion, none of which has two labels.
SMALL_GROUPS = np.concatenate(
    [1000 * k + np.arange(n) * 2 // 3 for k, n in enumerate(np.bincount(SMALL_LABELS))]
)


def assert_partition(split: Split, total: int) -> None:
    for part in (split.train, split.test):
        assert part.dtype == np.int64
        assert np.all(np.diff(part) > 0)
    assert sorted([*split.train, *split.test]) == list(range(total))


def test_by_image_has_the_papers_sizes() -> None:
    split = split_by_image(HAM_LABELS)
    assert (len(split.train), len(split.test)) == (8012, 2003)
    assert_partition(split, 10_015)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.35])
def test_by_image_keeps_the_proportions(fraction: float) -> None:
    split = split_by_image(HAM_LABELS, fraction)
    share = np.bincount(HAM_LABELS[split.test]) / np.bincount(HAM_LABELS)
    np.testing.assert_allclose(share, fraction, atol=0.01)


def test_by_lesion_parts_no_lesion() -> None:
    split = split_by_lesion(SMALL_LABELS, SMALL_GROUPS)
    assert_partition(split, len(SMALL_LABELS))
    assert not set(SMALL_GROUPS[split.train]) & set(SMALL_GROUPS[split.test])
    assert len(split.test) == pytest.approx(0.2 * len(SMALL_LABELS), rel=0.1)
    assert set(SMALL_LABELS[split.test]) == set(range(7))


@pytest.mark.parametrize("fraction", [0.5, 0.25, 1 / 3, 0.1])
def test_by_lesion_other_fractions(fraction: float) -> None:
    split = split_by_lesion(SMALL_LABELS, SMALL_GROUPS, fraction)
    assert len(split.test) == pytest.approx(fraction * len(SMALL_LABELS), rel=0.2)


def test_the_folds_of_a_split_by_lesion_test_every_image_once() -> None:
    folds = [split_by_lesion(SMALL_LABELS, SMALL_GROUPS, 0.25, 3, fold) for fold in range(4)]
    for split in folds:
        assert_partition(split, len(SMALL_LABELS))
        assert not set(SMALL_GROUPS[split.train]) & set(SMALL_GROUPS[split.test])
    tested = np.concatenate([split.test for split in folds])
    assert sorted(tested) == list(range(len(SMALL_LABELS)))
    through_dataset = make_split(dataset(), "lesion", 3, num_folds=4, fold=2)
    groups = dataset().groups()
    by_hand = split_by_lesion(SMALL_LABELS, groups, 0.25, 3, 2)
    np.testing.assert_array_equal(through_dataset.test, by_hand.test)
    with pytest.raises(SkinfastError, match="fold is 4; there are folds 0 to 3"):
        split_by_lesion(SMALL_LABELS, SMALL_GROUPS, 0.25, 3, 4)


@pytest.mark.parametrize("kind", ["image", "lesion"])
def test_seeds(kind: str) -> None:
    def split(seed: int) -> Split:
        if kind == "image":
            return split_by_image(SMALL_LABELS, seed=seed)
        return split_by_lesion(SMALL_LABELS, SMALL_GROUPS, seed=seed)

    np.testing.assert_array_equal(split(3).test, split(3).test)
    assert not np.array_equal(split(3).test, split(4).test)


def dataset(lesions: bool = True) -> LesionDataset:
    n = len(SMALL_LABELS)
    return LesionDataset(
        torch.zeros(n, 8, 8, 3, dtype=torch.uint8),
        torch.from_numpy(SMALL_LABELS),
        image_ids=[str(i) for i in range(n)],
        lesion_ids=[str(group) for group in SMALL_GROUPS] if lesions else None,
        source="a test",
    )


def test_make_split() -> None:
    by_image, by_lesion = make_split(dataset(), "image", 5), make_split(dataset(), "lesion", 5)
    np.testing.assert_array_equal(by_image.test, split_by_image(SMALL_LABELS, seed=5).test)
    groups = dataset().groups()
    assert not set(groups[by_lesion.train]) & set(groups[by_lesion.test])
    with pytest.raises(SkinfastError, match="unknown split 'patient'; choose image or lesion"):
        make_split(dataset(), "patient", 5)
    with pytest.raises(SkinfastError, match="a test does not say which images"):
        make_split(dataset(lesions=False), "lesion", 5)


@pytest.mark.parametrize(
    ("labels", "fraction", "message"),
    [
        ([], 0.2, r"give at least one, integer \[N\]"),
        ([0.5, 1.0], 0.2, r"give at least one, integer \[N\]"),
        ([0, 0, 7, 7], 0.5, "labels must be from 0 to 6"),
        ([0, 0, 0, 4], 0.5, "class mel has 1 image"),
        ([0, 0, 1, 1], 0.2, "4 images are too few .* a training set of 3 and a test set of 1"),
        ([0, 0, 1, 1], 0.8, "4 images are too few .* a training set of 0 and a test set of 4"),
        ([0, 0, 1, 1], 0.0, "test fraction 0.0: choose one between 0 and 1"),
        ([0, 0, 1, 1], 1.0, "test fraction 1.0: choose one between 0 and 1"),
    ],
)
def test_by_image_refuses(labels: list[int], fraction: float, message: str) -> None:
    with pytest.raises(SkinfastError, match=message):
        split_by_image(labels, fraction)


@pytest.mark.parametrize(
    ("labels", "groups", "fraction", "message"),
    [
        ([0, 1], [0], 0.2, "give one for each image"),
        ([0, 1], [0, 1], 0.3, "test fraction 0.3 is not 1/k"),
        ([0, 1], [0, 1], 0.9, "test fraction 0.9 is not 1/k"),
        ([0] * 9, [0, 1, 2, 3] * 2 + [0], 0.2, "4 lesions in 9 images are too few for 5 folds"),
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], 0.2, "5 lesions in 5 images are too few"),
        ([0] * 9, [0] * 9, 0.5, "1 lesions in 9 images are too few for 2 folds"),
    ],
)
def test_by_lesion_refuses(
    labels: list[int], groups: list[int], fraction: float, message: str
) -> None:
    with pytest.raises(SkinfastError, match=message):
        split_by_lesion(labels, groups, fraction)


def test_by_lesion_is_quiet_about_rare_classes(recwarn: pytest.WarningsRecorder) -> None:
    split_by_lesion([0] * 20 + [1], list(range(21)))
    assert not recwarn.list
