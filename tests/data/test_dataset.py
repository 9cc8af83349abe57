from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from skinfast import data
from skinfast.data import CLASS_NAMES, CLASSES, HAM10000, HAM10000_COUNTS, LesionDataset
from skinfast.errors import SkinfastError

from .folders import LABELS, ROWS, write_medmnist


def test_attributes(one_folder: Path) -> None:
    dataset = HAM10000(one_folder, 16)
    assert dataset.images.shape == (9, 16, 16, 3)
    assert dataset.images.dtype == torch.uint8
    assert dataset.labels.tolist() == LABELS
    assert dataset.labels.dtype == torch.int64
    assert dataset.lesion_ids == [lesion for _, lesion, _ in ROWS]
    assert dataset.image_ids == [image for image, _, _ in ROWS]
    assert dataset.image_size == 16
    assert dataset.source == str(one_folder)
    assert dataset.skipped == []
    assert len(dataset) == 9


def test_items_and_torch_loader(one_folder: Path) -> None:
    dataset = HAM10000(one_folder, 16)
    image, label = dataset[3]
    assert torch.equal(image, dataset.images[3])
    assert label == LABELS[3]
    batches = list(DataLoader(dataset, batch_size=4))
    assert torch.equal(torch.cat([images for images, _ in batches]), dataset.images)
    assert torch.cat([labels for _, labels in batches]).tolist() == LABELS


def test_groups(one_folder: Path) -> None:
    groups = HAM10000(one_folder, 16).groups()
    assert groups.dtype == np.int64
    assert groups.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6]


def test_groups_without_lesion_ids(tmp_path: Path) -> None:
    write_medmnist(tmp_path / "dermamnist.npz")
    with pytest.raises(SkinfastError, match="does not say which images show the same lesion; sp"):
        HAM10000(tmp_path, 28).groups()


def test_class_counts(one_folder: Path) -> None:
    counts = HAM10000(one_folder, 16).class_counts()
    assert counts == {"akiec": 1, "bcc": 1, "bkl": 1, "df": 1, "mel": 2, "nv": 2, "vasc": 1}


def test_classes() -> None:
    assert tuple(CLASS_NAMES) == tuple(HAM10000_COUNTS) == CLASSES == tuple(sorted(CLASSES))
    assert sum(HAM10000_COUNTS.values()) == 10_015


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 8, 8, 3)}, r"give uint8 \[N, H, W, 3\]"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, r"give uint8 \[N, H, W, 3\]"),
        ({"images": torch.zeros(2, 8, 9, 3, dtype=torch.uint8)}, "make them square"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"give int64 \[2\]"),
        ({"labels": torch.zeros(2)}, r"give int64 \[2\]"),
        ({"labels": torch.tensor([0, 7])}, "labels must be from 0 to 6"),
        ({"image_ids": ["a"]}, "1 image_ids for 2 images"),
        ({"lesion_ids": ["a"]}, "1 lesion_ids for 2 images"),
    ],
)
def test_parts_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    parts: dict[str, Any] = {
        "images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        "labels": torch.zeros(2, dtype=torch.int64),
        "image_ids": ["a", "b"],
        "lesion_ids": None,
        "source": "test",
    }
    LesionDataset(**parts)
    with pytest.raises(SkinfastError, match=message):
        LesionDataset(**{**parts, **change})


def test_every_public_name_loads() -> None:
    for name in data.__all__:
        assert getattr(data, name) is not None
        assert name in dir(data)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        data.nonsense  # noqa: B018


def test_reading_a_layout_imports_nothing_heavy() -> None:
    code = (
        "import sys; from skinfast.data import CLASSES, find_records; "
        "print([m for m in ('torch', 'sklearn', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
