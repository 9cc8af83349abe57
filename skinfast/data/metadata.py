"""The label files of HAM10000: its own metadata table and ISIC 2018 Task 3's ground truth."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from skinfast.data.classes import CLASSES
from skinfast.errors import SkinfastError


class Diagnosis(NamedTuple):
    """What a label file says of one image; ``lesion_id`` is None where it names no lesions."""

    label: int
    lesion_id: str | None


def read_ham10000_metadata(path: Path) -> dict[str, Diagnosis]:
    """Read ``lesion_id,image_id,dx,...`` (comma or tab separated); image_id -> diagnosis.

    Raises:
        SkinfastError: empty, a missing column or value, an unknown diagnosis, an image_id twice.
    """
    diagnoses: dict[str, Diagnosis] = {}
    for number, row in _rows(path, ("lesion_id", "image_id", "dx")):
        for column, value in row.items():
            if not value:
                raise SkinfastError(f"{path} row {number}: {column} is empty; fill it in")
        if row["dx"] not in CLASSES:
            raise SkinfastError(
                f"{path} row {number} ({row['image_id']}): unknown diagnosis {row['dx']!r}; "
                f"it must be one of {', '.join(CLASSES)}"
            )
        diagnosis = Diagnosis(CLASSES.index(row["dx"]), row["lesion_id"])
        _add(diagnoses, row["image_id"], diagnosis, path, number)
    return diagnoses


def read_isic2018_ground_truth(path: Path, groupings: Sequence[Path]) -> dict[str, Diagnosis]:
    """Read ``image,MEL,NV,...`` one-hot, with lesions from ``groupings``; image_id -> diagnosis.

    Raises:
        SkinfastError: empty, a missing column, a row that is not one-hot, an image twice, or an
            image that the groupings do not have.
    """
    # ISIC's own column order differs from CLASSES, so columns are found by name.
    columns = [name.upper() for name in CLASSES]
    lesions = _read_lesion_groupings(groupings)
    diagnoses: dict[str, Diagnosis] = {}
    for number, row in _rows(path, ("image", *columns)):
        image_id = row["image"]
        try:
            marks = [float(row[column]) for column in columns]
        except ValueError:
            marks = []
        if sorted(marks) != [0.0] * (len(CLASSES) - 1) + [1.0]:
            raise SkinfastError(
                f"{path} row {number} ({image_id}): needs a 1 in exactly one of "
                f"{', '.join(columns)} and 0 in the others"
            )
        if lesions and image_id not in lesions:
            raise SkinfastError(
                f"{groupings[0]} has no lesion for {image_id} of {path.name}; "
                "complete it or remove it (then a split by lesion is not possible)"
            )
        diagnosis = Diagnosis(marks.index(1.0), lesions.get(image_id))
        _add(diagnoses, image_id, diagnosis, path, number)
    return diagnoses


def require_agreement(tables: Sequence[tuple[Path, dict[str, Diagnosis]]]) -> None:
    """Raise SkinfastError unless all label files speak of the same images and agree on them."""
    first_path, first = tables[0]
    for path, other in tables[1:]:
        for image_id in sorted({*first, *other}):
            if not _agree(first.get(image_id), other.get(image_id)):
                raise SkinfastError(
                    f"{first_path} and {path} contradict each other about {image_id}; "
                    "remove the one that is wrong"
                )


def _agree(a: Diagnosis | None, b: Diagnosis | None) -> bool:
    if a is None or b is None:
        return False
    return a.label == b.label and (
        a.lesion_id == b.lesion_id or a.lesion_id is None or b.lesion_id is None
    )


def _read_lesion_groupings(paths: Sequence[Path]) -> dict[str, str]:
    lesions: dict[str, str] = {}
    for path in paths:
        for number, row in _rows(path, ("image", "lesion_id")):
            if lesions.setdefault(row["image"], row["lesion_id"]) != row["lesion_id"]:
                raise SkinfastError(
                    f"{path} row {number}: {row['image']} is given two lesions; keep one"
                )
    return lesions


def _add(
    diagnoses: dict[str, Diagnosis], image_id: str, diagnosis: Diagnosis, path: Path, number: int
) -> None:
    if image_id in diagnoses:
        raise SkinfastError(
            f"{path} row {number}: image {image_id} was listed before; keep one of the two rows"
        )
    diagnoses[image_id] = diagnosis


def _rows(path: Path, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, the required columns of that row), values stripped."""
    try:
        # utf-8-sig: spreadsheets put a byte order mark first, which would hide the first column.
        text = path.read_text(encoding="utf-8-sig")
        lines = text.splitlines()
        delimiter = "\t" if lines and "\t" in lines[0] else ","
        reader = csv.DictReader(lines, delimiter=delimiter)
        columns = reader.fieldnames or []
        missing = [column for column in required if column not in columns]
        if missing and lines:
            raise SkinfastError(
                f"{path} has no column {', '.join(missing)} (its columns: {', '.join(columns)}); "
                "use the original file"
            )
        rows = [
            (reader.line_num, {column: (row[column] or "").strip() for column in required})
            for row in reader
        ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SkinfastError(f"cannot read {path}: {error}; use the original file") from error
    if not rows:
        raise SkinfastError(f"{path} is empty; use the original file")
    yield from rows
