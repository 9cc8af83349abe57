"""Small data folders in every layout."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from skinfast.data import CLASSES

# image_id, lesion_id, class: every class, and two lesions that were photographed twice.
Row = tuple[str, str, str]
ROWS: list[Row] = [
    ("ISIC_0000001", "HAM_1", "akiec"),
    ("ISIC_0000002", "HAM_2", "bcc"),
    ("ISIC_0000003", "HAM_3", "bkl"),
    ("ISIC_0000004", "HAM_4", "df"),
    ("ISIC_0000005", "HAM_5", "mel"),
    ("ISIC_0000006", "HAM_5", "mel"),
    ("ISIC_0000007", "HAM_7", "nv"),
    ("ISIC_0000008", "HAM_7", "nv"),
    ("ISIC_0000009", "HAM_9", "vasc"),
]
LABELS = [CLASSES.index(name) for _, _, name in ROWS]


def write_image(path: Path, size: tuple[int, int] = (20, 15)) -> None:
    """A picture that differs from one file name to the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.stem.encode())
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_metadata(path: Path, rows: Sequence[Row] = ROWS, delimiter: str = ",") -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"])
        writer.writerows(
            [lesion, image, dx, "histo", 50, "male", "back"] for image, lesion, dx in rows
        )


def write_ground_truth(path: Path, rows: Sequence[Row] = ROWS) -> None:
    columns = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", *columns])
        for image, _, dx in rows:
            writer.writerow([image, *(f"{float(column == dx.upper())}" for column in columns)])


def write_groupings(path: Path, rows: Sequence[Row] = ROWS) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "lesion_id", "diagnosis confirm type"])
        writer.writerows([image, lesion, "histopathology"] for image, lesion, _ in rows)


def write_medmnist(path: Path, side: int = 28, num_images: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(side)
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = rng.integers(0, 256, (num_images, side, side, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 7, (num_images, 1), dtype=np.uint8)
    np.savez_compressed(path, **arrays)
    return arrays
