"""Reads what a training run left behind, and refuses what is missing or broken by name."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skinfast.errors import SkinfastError
from skinfast.files import BROKEN_NPZ
from skinfast.report.calibration import Calibration, read_calibration

_ARRAYS = ("image_ids", "labels", "probabilities", "sample_index", "sample_images")

_NUMBER = (int, float)
_NUMBER_OR_NONE = (int, float, type(None))

_CONFIG_KEYS = {"model": str, "image_size": int}
_EPOCH_KEYS = {
    "epoch": int,
    "train_loss": _NUMBER_OR_NONE,
    "train_accuracy": _NUMBER_OR_NONE,
    "test_loss": _NUMBER_OR_NONE,
    "test_accuracy": _NUMBER_OR_NONE,
    "images_per_second": _NUMBER_OR_NONE,
}
_RESULT_KEYS = {
    "classes": list,
    "loss": _NUMBER,
    "accuracy": _NUMBER,
    "majority_accuracy": _NUMBER,
    "balanced_accuracy": _NUMBER,
    "f1_weighted": _NUMBER,
    "f1_macro": _NUMBER,
    "precision_macro": _NUMBER,
    "recall_macro": _NUMBER,
    "auc_macro": _NUMBER_OR_NONE,
    "per_class": list,
    "confusion_matrix": list,
    "environment": dict,
    "data": dict,
    "train_seconds": _NUMBER,
    "epochs": int,
}
_PER_CLASS_KEYS = {
    "name": str,
    "precision": _NUMBER,
    "recall": _NUMBER,
    "f1": _NUMBER,
    "auc": _NUMBER_OR_NONE,
    "support": int,
}
_DATA_KEYS = {
    "source": str,
    "num_train": int,
    "num_test": int,
    "skipped": list,
    "class_counts_train": dict,
    "class_counts_test": dict,
}


@dataclass(frozen=True)
class Sample:
    """One test image with its prediction; ``pixels`` is uint8 ``[H, W, 3]``, RGB."""

    image_id: str
    true_class: str
    predicted_class: str
    probability: float
    pixels: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Run:
    """A run folder in memory, its keys and shapes checked."""

    config: dict[str, Any]
    epochs: list[dict[str, Any]]
    result: dict[str, Any]
    samples: list[Sample]
    calibration: Calibration | None


def read_run(directory: str | os.PathLike[str]) -> Run:
    """Read the files of a run; ``calibration.json`` is the one that may be missing.

    Raises:
        SkinfastError: the folder or a file is missing, cut off or lacks a key; the line names the
            file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise SkinfastError(
            f"{directory}: no such run folder; give the --output folder of `skinfast train`"
        )
    config_path = directory / "config.json"
    config = _parse_json(_read_text(config_path), str(config_path))
    _require(config, _CONFIG_KEYS, str(config_path))

    epochs = _read_epochs(directory / "metrics.jsonl")

    result_path = directory / "result.json"
    result = _parse_json(_read_text(result_path), str(result_path))
    _check_result(result, str(result_path))

    samples = _read_samples(directory / "predictions.npz", result["classes"])
    return Run(config, epochs, result, samples, read_calibration(directory, result))


def _broken(where: str, what: str) -> SkinfastError:
    return SkinfastError(
        f"{where}: {what}; finish the run with `skinfast train --resume` or train again"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _broken(str(path), "missing, the run has not finished") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(str(path), f"cannot be read ({error})") from error


def _parse_json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _broken(where, f"cut off or not JSON ({error})") from error
    if not isinstance(value, dict):
        raise _broken(where, "not a JSON object")
    return value


def _require(value: Any, keys: dict[str, Any], where: str) -> None:
    """Raise unless ``value`` is a dict that has ``keys``, each of its type."""
    if not isinstance(value, dict):
        raise _broken(where, "not a JSON object")
    for key, kind in keys.items():
        if key not in value:
            raise _broken(where, f"has no {key!r}")
        if not isinstance(value[key], kind):
            raise _broken(where, f"{key!r} cannot be {str(value[key])[:40]!r}")


def _read_epochs(path: Path) -> list[dict[str, Any]]:
    epochs = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        epoch = _parse_json(line, where)
        _require(epoch, _EPOCH_KEYS, where)
        epochs.append(epoch)
    if not epochs:
        raise _broken(str(path), "empty, no epoch has finished")
    return epochs


def _check_result(result: dict[str, Any], where: str) -> None:
    _require(result, _RESULT_KEYS, where)
    _require(result["data"], _DATA_KEYS, f"{where}, 'data'")
    for entry in result["per_class"]:
        _require(entry, _PER_CLASS_KEYS, f"{where}, 'per_class'")

    names = result["classes"]
    if not names or [entry["name"] for entry in result["per_class"]] != names:
        raise _broken(where, "'per_class' does not list the classes of 'classes'")
    rows = result["confusion_matrix"]
    if len(rows) != len(names) or not all(
        isinstance(row, list)
        and len(row) == len(names)
        and all(isinstance(count, int) and count >= 0 for count in row)
        for row in rows
    ):
        raise _broken(where, f"'confusion_matrix' is not {len(names)} x {len(names)} counts")
    data = result["data"]
    for key in ("class_counts_train", "class_counts_test"):
        if not all(isinstance(count, int) for count in data[key].values()):
            raise _broken(where, f"{key!r} holds something else than counts")
    if not all(isinstance(entry, list) and len(entry) == 2 for entry in data["skipped"]):
        raise _broken(where, "'skipped' is not a list of [image id, reason]")


def _read_samples(path: Path, class_names: list[str]) -> list[Sample]:
    try:
        # Without pickle a run folder from a stranger cannot run code here.
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise _broken(str(path), "missing, the run has not finished") from None
    except BROKEN_NPZ as error:
        raise _broken(str(path), f"cut off or not an .npz file ({error})") from error

    for name in _ARRAYS:
        if name not in arrays:
            raise _broken(str(path), f"has no array {name!r}")
    image_ids, labels, probabilities, index, images = (arrays[name] for name in _ARRAYS)

    num_images, num_classes = labels.size, len(class_names)
    if (
        image_ids.shape != (num_images,)
        or probabilities.shape != (num_images, num_classes)
        or images.shape != (index.size, *images.shape[1:3], 3)
        or images.dtype != np.uint8
        or not _indices(index, below=num_images)
        or not _indices(labels, below=num_classes)
    ):
        raise _broken(str(path), "its arrays do not fit each other or the classes of result.json")

    samples = []
    for position, pixels in zip(index.tolist(), images, strict=True):
        row = probabilities[position]
        samples.append(
            Sample(
                image_id=str(image_ids[position]),
                true_class=class_names[int(labels[position])],
                predicted_class=class_names[int(row.argmax())],
                probability=float(row.max()),
                pixels=pixels,
            )
        )
    return samples


def _indices(values: npt.NDArray[Any], below: int) -> bool:
    """Whether ``values`` is a vector of integers in ``[0, below)``."""
    return (
        values.ndim == 1
        and values.dtype.kind in "iu"
        and bool(((values >= 0) & (values < below)).all())
    )
