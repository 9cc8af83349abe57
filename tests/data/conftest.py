from __future__ import annotations

from pathlib import Path

import pytest

from .folders import ROWS, write_image, write_metadata


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache folder of its own, outside of its data folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SKINFAST_CACHE", str(folder))
    return folder


@pytest.fixture
def one_folder(tmp_path: Path) -> Path:
    """``images/`` and ``HAM10000_metadata.csv``."""
    root = tmp_path / "ham10000"
    for image, _, _ in ROWS:
        write_image(root / "images" / f"{image}.jpg")
    write_metadata(root / "HAM10000_metadata.csv")
    return root
