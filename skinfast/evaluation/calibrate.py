"""The temperature of a run: fitted on half of its test images, measured on the other half."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from skinfast.data.classes import CLASSES
from skinfast.data.splits import split_by_lesion
from skinfast.errors import SkinfastError
from skinfast.evaluation.calibration import calibration_figures, fit_temperature, with_temperature
from skinfast.evaluation.run import evaluate_run
from skinfast.evaluation.temperature import FILE_NAME, checksum
from skinfast.files import atomic_write_text
from skinfast.training.run_folder import RunFolder


def calibrate_run(
    directory: str | os.PathLike[str],
    *,
    data: str | None = None,
    device: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit a run's temperature and leave it in ``calibration.json``.

    Not every run has a validation part, and where one has, it chose the epoch that is kept. So the
    test images are halved, each class in its proportion and no lesion in both halves where lesions
    are known: one half fits the temperature, on the other all figures are measured, before and
    after. Predictions on the first half are never reported.

    What is calibrated are the answers that the run's settings ask for, with test-time augmentation
    or without (see ``read_temperature``).

    Args:
        directory: the folder of a finished run.
        data, device: as for ``evaluate_run``.
        seed: of the halving and the bootstrap.

    Returns:
        The content of the file: ``temperature``, ``before`` and ``after`` (what
        ``calibration_figures`` returns, both for the measured half), ``num_fitted``,
        ``num_measured``, ``grouped_by_lesion``, ``lesions_shared_with_training`` (test images of a
        lesion that trained the model; None where lesions are not known), ``seed``,
        ``test_time_augmentation``, ``fitted_image_ids`` and ``model_sha256``, which ties it to the
        weights; with other data ``test_images``, as of ``evaluate_run``.

    Raises:
        SkinfastError: the run folder or data cannot be used, or the test images are too few.
        OSError: the file cannot be written.
    """
    run = RunFolder(directory)
    metrics, problem, computed = evaluate_run(directory, data=data, device=device)
    probabilities, test = computed.numpy(), problem.split.test
    labels = problem.dataset.labels[test].numpy()
    lesions = None if problem.dataset.lesion_ids is None else problem.dataset.groups()
    groups = np.arange(len(test)) if lesions is None else lesions[test]
    try:
        halves = split_by_lesion(labels, groups, 0.5, seed)
    except SkinfastError as error:
        raise SkinfastError(
            f"{len(test)} test images cannot be halved into images that fit and images that "
            f"measure ({error})"
        ) from error
    fitted, measured = halves.train, halves.test
    temperature = fit_temperature(labels[fitted], probabilities[fitted])
    before, after = (
        calibration_figures(labels[measured], p, CLASSES, groups=groups[measured], seed=seed)
        for p in (
            probabilities[measured],
            with_temperature(probabilities[measured], temperature),
        )
    )
    shared = None
    if lesions is not None:
        shared = int(np.isin(lesions[test], lesions[problem.split.train]).sum())
    calibration = {
        "temperature": temperature,
        "num_fitted": len(fitted),
        "num_measured": len(measured),
        "grouped_by_lesion": lesions is not None,
        "lesions_shared_with_training": shared,
        "seed": seed,
        "test_time_augmentation": problem.config.test_time_augmentation,
        "before": before,
        "after": after,
        "model_sha256": checksum(run.model_file),
        "fitted_image_ids": [problem.dataset.image_ids[i] for i in test[fitted]],
    }
    if "test_images" in metrics:
        calibration["test_images"] = metrics["test_images"]
    atomic_write_text(run.directory / FILE_NAME, json.dumps(calibration, indent=2) + "\n")
    return calibration
