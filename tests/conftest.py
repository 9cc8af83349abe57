from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.folders import write_image, write_metadata

CLASS_SIZES = {"akiec": 6, "bcc": 8, "bkl": 12, "df": 5, "mel": 12, "nv": 60, "vasc": 5}


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HAM10000 folder of 108 pictures that can be split both ways."""
    root = tmp_path_factory.mktemp("small") / "ham10000"
    rows = [
        (f"ISIC_{dx}{i:03}", f"HAM_{dx}{i:03}", dx)
        for dx, size in CLASS_SIZES.items()
        for i in range(size)
    ]
    for image, _, _ in rows:
        write_image(root / "images" / f"{image}.png")
    write_metadata(root / "HAM10000_metadata.csv", rows)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes into the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("SKINFAST_CACHE", str(folder))
    return folder
