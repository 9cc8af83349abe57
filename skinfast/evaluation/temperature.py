"""Reading the temperature that `skinfast calibrate` left in a run folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from skinfast.errors import SkinfastError
from skinfast.evaluation.calibration import TEMPERATURE_RANGE
from skinfast.training.run_folder import RunFolder

FILE_NAME = "calibration.json"


def read_temperature(
    directory: str | os.PathLike[str], test_time_augmentation: bool
) -> float | None:
    """The temperature for a run's answers; None where none was fitted to answers like them.

    It divides the logits of what answers, which with test-time augmentation are the logarithms of
    the mean probabilities over the views: a temperature that was fitted to those holds for no
    single view, nor the other way round, since the mean is less sure of itself than a view.

    Raises:
        SkinfastError: calibration.json is broken.

    Source: Rahaman and Thiery, "Uncertainty Quantification and Deep Ensembles",
    https://arxiv.org/abs/2007.08792, who find that an average is to be calibrated as a whole.
    """
    calibration = read_calibration(directory)
    if calibration is None or calibration["test_time_augmentation"] != test_time_augmentation:
        return None
    return float(calibration["temperature"])


def read_calibration(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The run's calibration.json; None where there is none, or it belongs to other weights.

    Training that goes on changes the weights; a temperature of the old ones would mislead.

    Raises:
        SkinfastError: the file is broken.
    """
    run = RunFolder(directory)
    path = run.directory / FILE_NAME
    try:
        calibration = json.loads(path.read_text(encoding="utf-8"))
        temperature = float(calibration["temperature"])
        bool(calibration["test_time_augmentation"])
        belongs = calibration["model_sha256"] == checksum(run.model_file)
        if not TEMPERATURE_RANGE[0] <= temperature <= TEMPERATURE_RANGE[1]:
            raise ValueError(f"temperature {temperature}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SkinfastError(
            f"{path} cannot be used ({error}); remove it, or run `skinfast calibrate` again"
        ) from error
    return calibration if belongs else None


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
