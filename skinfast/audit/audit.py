"""The audit of a data set: everything that would make test figures wrong or unfair."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from skinfast.audit.duplicates import NEAR_IDENTICAL, Pair, find_pairs
from skinfast.audit.metadata_leak import metadata_leaks, read_columns
from skinfast.data import CLASSES, HAM10000, LesionDataset, Split, SyntheticLesions, make_split
from skinfast.data.layouts import Record, find_records

# Divisible by 32, as the perceptual hash wants it, and the size whose cache most runs share.
_IMAGE_SIZE = 64


@dataclass(frozen=True)
class Audit:
    """The findings, and what is needed to show them.

    Attributes:
        findings: ready for JSON (see ``audit``).
        dataset: the images that could be read, at 64x64.
        pairs: the positions behind ``findings["pairs"]``, in the same order.
    """

    findings: dict[str, Any]
    dataset: LesionDataset
    pairs: list[Pair]


def audit(data: str, split: str = "image", seed: int = 0) -> Audit:
    """Look for what would make figures measured on a data set wrong.

    Args:
        data: a data folder, a MedMNIST ``.npz``, or "synthetic".
        split: "image" or "lesion": the split that training would use.
        seed: of that split, as in training.

    Returns:
        Findings: ``lesions`` (how many test images show a lesion that trains; None where lesions
        are not known), ``pairs`` (identical and nearly identical images), ``label_conflicts``
        (lesions and pairs with more than one class), ``unreadable`` and ``metadata`` (see
        ``metadata_leaks``), beside ``num_images``, ``num_train``, ``num_test``, ``split``, ``seed``
        and ``summary``, the counts that matter.

    Raises:
        SkinfastError: the data cannot be used at all, or not be split so.
    """
    records: dict[str, Record] = {}
    dataset: LesionDataset
    if data == "synthetic":
        dataset = SyntheticLesions(image_size=_IMAGE_SIZE)
    else:
        dataset = HAM10000(data, _IMAGE_SIZE, skip_bad_images=True)
        records = {record.image_id: record for record in find_records(data, _IMAGE_SIZE)}
    halves = make_split(dataset, split, seed)
    in_test = np.zeros(len(dataset), bool)
    in_test[halves.test] = True
    known = dataset.lesion_ids is not None
    groups = dataset.groups() if known else np.arange(len(dataset))
    labels = dataset.labels.numpy()

    pairs = find_pairs(
        dataset.images.numpy(), [records[i] for i in dataset.image_ids] if records else None
    )
    described = [_describe(pair, dataset, in_test) for pair in pairs]
    columns = {} if data == "synthetic" else read_columns(data, dataset.image_ids)
    findings = {
        "source": dataset.source,
        "split": split,
        "seed": seed,
        "num_images": len(dataset),
        "num_train": len(halves.train),
        "num_test": len(halves.test),
        "lesions": _shared_lesions(groups, halves) if known else None,
        "pairs": described,
        "near_identical_from": NEAR_IDENTICAL,
        "label_conflicts": {
            "lesions": _conflicting_lesions(dataset),
            "pairs": [entry for entry in described if entry["conflict"]],
        },
        "unreadable": [list(entry) for entry in dataset.skipped],
        "metadata": metadata_leaks(columns, labels, groups, seed),
    }
    findings["summary"] = _summary(findings)
    return Audit(findings, dataset, pairs)


def _shared_lesions(groups: npt.NDArray[np.int64], split: Split) -> dict[str, Any]:
    shared = np.isin(groups[split.test], groups[split.train])
    return {
        "num_lesions": len(np.unique(groups)),
        "num_lesions_with_several_images": int((np.bincount(groups) > 1).sum()),
        "num_lesions_on_both_sides": len(np.unique(groups[split.test][shared])),
        "test_images_of_training_lesions": int(shared.sum()),
        "share_of_test": float(shared.mean()),
    }


def _describe(pair: Pair, dataset: LesionDataset, in_test: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """A pair by name, and what makes it matter."""
    both = (pair.first, pair.second)
    names = [CLASSES[int(dataset.labels[i])] for i in both]
    lesions = dataset.lesion_ids
    return {
        "images": [dataset.image_ids[i] for i in both],
        "classes": names,
        "lesions": None if lesions is None else [lesions[i] for i in both],
        "same_lesion": None if lesions is None else lesions[both[0]] == lesions[both[1]],
        "identical": pair.identical,
        "correlation": pair.correlation,
        "hash_distance": pair.hash_distance,
        "turned": pair.turned,
        "mirrored": pair.mirrored,
        "sides": ["test" if in_test[i] else "train" for i in both],
        "across_split": bool(in_test[both[0]] != in_test[both[1]]),
        "conflict": names[0] != names[1],
    }


def _conflicting_lesions(dataset: LesionDataset) -> list[dict[str, Any]]:
    """Lesions whose photographs have different classes."""
    if dataset.lesion_ids is None:
        return []
    images: defaultdict[str, list[int]] = defaultdict(list)
    for i, lesion in enumerate(dataset.lesion_ids):
        images[lesion].append(i)
    return [
        {
            "lesion": lesion,
            "images": [dataset.image_ids[i] for i in members],
            "classes": [CLASSES[int(dataset.labels[i])] for i in members],
        }
        for lesion, members in sorted(images.items())
        if len({int(dataset.labels[i]) for i in members}) > 1
    ]


def _summary(findings: dict[str, Any]) -> dict[str, int | None]:
    pairs, lesions = findings["pairs"], findings["lesions"]
    identical = [pair for pair in pairs if pair["identical"]]
    near = [pair for pair in pairs if not pair["identical"]]
    return {
        "test_images_of_training_lesions": None
        if lesions is None
        else lesions["test_images_of_training_lesions"],
        "identical_pairs": len(identical),
        "identical_pairs_across_split": sum(pair["across_split"] for pair in identical),
        "near_identical_pairs": len(near),
        "near_identical_pairs_across_split": sum(pair["across_split"] for pair in near),
        "pairs_of_different_lesions": None
        if lesions is None
        else sum(not pair["same_lesion"] for pair in pairs),
        "lesions_with_conflicting_labels": len(findings["label_conflicts"]["lesions"]),
        "pairs_with_conflicting_labels": len(findings["label_conflicts"]["pairs"]),
        "unreadable_images": len(findings["unreadable"]),
    }
