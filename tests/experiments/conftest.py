from __future__ import annotations

from pathlib import Path

import pytest

from skinfast.training import TrainConfig
from tests.data.folders import write_image, write_metadata

LESIONS = {"akiec": 6, "bcc": 7, "bkl": 9, "df": 6, "mel": 9, "nv": 40, "vasc": 6}


@pytest.fixture(scope="session")
def paired_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HAM10000 folder in which every third lesion was photographed twice."""
    root = tmp_path_factory.mktemp("paired") / "ham10000"
    rows = [
        (f"ISIC_{dx}{i:03}{view}", f"HAM_{dx}{i:03}", dx)
        for dx, number in LESIONS.items()
        for i in range(number)
        for view in ("a", "b")[: 2 if i % 3 == 0 else 1]
    ]
    for image, _, _ in rows:
        write_image(root / "images" / f"{image}.png")
    write_metadata(root / "HAM10000_metadata.csv", rows)
    return root


@pytest.fixture
def config(paired_data: Path) -> TrainConfig:
    """A training of a second."""
    return TrainConfig(
        model="logistic-regression",
        data=str(paired_data),
        image_size=16,
        epochs=2,
        batch_size=16,
        device="cpu",
        split="lesion",
    )
