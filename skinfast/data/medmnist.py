"""MedMNIST's DermaMNIST: HAM10000 as arrays in one ``.npz`` file, without lesion ids."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skinfast.data.classes import CLASSES
from skinfast.errors import SkinfastError

#: ``dermamnist.npz`` holds 28x28 images, ``dermamnist_64.npz`` 64x64, and so on.
FILE_NAME = re.compile(r"dermamnist(?:_(\d+))?\.npz", re.IGNORECASE)
_PARTS = ("train", "val", "test")


def choose_file(paths: list[Path], image_size: int) -> Path:
    """Of several sizes take the smallest that is at least ``image_size``, else the largest."""

    def side(path: Path) -> int:
        match = FILE_NAME.fullmatch(path.name)
        return int(match[1] or 28) if match else 0

    large_enough = [path for path in paths if side(path) >= image_size]
    return min(large_enough, key=side) if large_enough else max(paths, key=side)


def read_labels(path: Path) -> list[tuple[str, int]]:
    """(image_id, label) of every image, in the order of ``read_images``.

    Raises:
        SkinfastError: not an ``.npz`` file, an array missing, or a label outside 0..6.
    """
    labels: list[tuple[str, int]] = []
    for part, array in zip(_PARTS, _arrays(path, "labels"), strict=True):
        values = array.reshape(-1)
        if not np.issubdtype(values.dtype, np.integer) or np.any(
            (values < 0) | (values >= len(CLASSES))
        ):
            raise SkinfastError(
                f"{path}: {part}_labels must be integers from 0 to {len(CLASSES) - 1}; "
                "use the DermaMNIST file"
            )
        labels += [(f"{part}_{i:05d}", int(label)) for i, label in enumerate(values)]
    if not labels:
        raise SkinfastError(f"{path} is empty; use the DermaMNIST file")
    return labels


def read_images(path: Path) -> npt.NDArray[np.uint8]:
    """All images, training then validation then test: uint8 ``[N, H, W, 3]``.

    Raises:
        SkinfastError: an array is missing or is not uint8 ``[n, H, W, 3]``.
    """
    arrays = _arrays(path, "images")
    for part, array in zip(_PARTS, arrays, strict=True):
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise SkinfastError(
                f"{path}: {part}_images is {array.dtype} {list(array.shape)}, "
                "needs uint8 [n, H, W, 3]; use the DermaMNIST file"
            )
    return np.concatenate(arrays)


def _arrays(path: Path, kind: str) -> list[npt.NDArray[Any]]:
    names = [f"{part}_{kind}" for part in _PARTS]
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive]
            if missing:
                raise SkinfastError(
                    f"{path} has no array {', '.join(missing)}; use the DermaMNIST file"
                )
            return [archive[name] for name in names]
    except SkinfastError:  # a ValueError too: do not wrap it as a damaged file
        raise
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise SkinfastError(f"cannot read {path}: {error}; download it again") from error
