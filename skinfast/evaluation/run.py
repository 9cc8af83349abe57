"""A trained run held against its test images, and single images held against a trained run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from skinfast.data.batches import DeviceBatches
from skinfast.data.classes import CLASSES
from skinfast.data.dataset import HAM10000, LesionDataset
from skinfast.data.decoding import BadImageError, decode_image
from skinfast.data.layouts import find_records
from skinfast.data.splits import Split
from skinfast.data.synthetic import SyntheticLesions
from skinfast.environment import environment
from skinfast.errors import SkinfastError
from skinfast.evaluation.calibration import calibration_figures, with_temperature
from skinfast.evaluation.metrics import classification_metrics
from skinfast.evaluation.temperature import read_calibration, read_temperature
from skinfast.evaluation.test_time_augmentation import MeanOverViews
from skinfast.files import BROKEN_NPZ, atomic_path, atomic_write_text
from skinfast.training.config import TrainConfig
from skinfast.training.model_file import ModelDescription, load_model
from skinfast.training.problem import Problem, choose_device, prepare
from skinfast.training.run_folder import RunFolder
from skinfast.training.step import logits_of

# Images that `predict` classifies in one pass.
_IMAGES_AT_ONCE = 64
# Pictures that the report shows of each class.
_SAMPLES_PER_CLASS = 4


def evaluate_run(
    directory: str | os.PathLike[str],
    *,
    data: str | None = None,
    device: str | None = None,
    problem: Problem | None = None,
    test_time_augmentation: bool | None = None,
) -> tuple[dict[str, Any], Problem, torch.Tensor]:
    """Apply a run's model to its test images, or to other data.

    Of other data the run's test images are used, by name, as many as are there. Where there is none
    of them, all images are, but for those of the run's own data, which trained the model.

    Args:
        directory: the run folder.
        data: another data folder; None means the one of the run.
        device: another device; None means the one of the run.
        problem: the run's own prepared data, where the caller has it.
        test_time_augmentation: mean over the eight views of each image; None means as the run's
            settings say.

    Returns:
        The metrics of ``classification_metrics``, the data, and the probabilities, float32
        ``[N, C]`` in the order of ``split.test``. The metrics have ``calibration`` as well (see
        ``calibration_figures``) and, where the run has a temperature that was fitted to such
        answers (see ``read_temperature``), ``temperature`` and ``calibrated``: the same figures
        with it, without the images that it was fitted on. The probabilities are the model's own.
        With other data, ``test_images`` says in words which they are.

    Raises:
        SkinfastError: the run folder or the data cannot be used, or all the images trained the
            model.
    """
    run = RunFolder(directory)
    settings = TrainConfig.load(run.config_file)
    config = dataclasses.replace(
        settings, data=data or settings.data, device=device or settings.device
    )
    model, description = load_model(
        run.model_file, choose_device(config.device), backend=config.backend
    )
    said = {}
    if data is not None:
        problem, said["test_images"] = _other_data(run, settings, config, description)
    else:
        problem = problem or prepare(config)
        problem = dataclasses.replace(problem, mean=description.mean, std=description.std)
    if test_time_augmentation is None:
        test_time_augmentation = config.test_time_augmentation
    if test_time_augmentation:
        model = MeanOverViews(model)
    logits = logits_of(model, problem.test_batches(), problem.device, config.precision)
    probabilities = torch.softmax(logits, 1).cpu()
    labels = problem.dataset.labels[problem.split.test]
    metrics = classification_metrics(labels, probabilities, CLASSES)
    fitted = read_calibration(run.directory)
    if fitted is not None and fitted["test_time_augmentation"] != test_time_augmentation:
        fitted = None
    metrics |= _calibration(fitted, problem, labels.numpy(), probabilities.numpy())
    return metrics | said, problem, probabilities


def _calibration(
    fitted: dict[str, Any] | None, problem: Problem, labels: np.ndarray, probabilities: np.ndarray
) -> dict[str, Any]:
    """How far the probabilities can be believed, as they are and with the fitted temperature."""
    dataset, test, seed = problem.dataset, problem.split.test, problem.config.seed
    groups = np.arange(len(dataset)) if dataset.lesion_ids is None else dataset.groups()
    groups = groups[test]
    figures = calibration_figures(labels, probabilities, CLASSES, groups=groups, seed=seed)
    if fitted is None:
        return {"calibration": figures}
    names = np.array(dataset.image_ids)[test]
    fresh = ~np.isin(names, fitted["fitted_image_ids"])
    if not fresh.any():
        return {"calibration": figures}
    scaled = with_temperature(probabilities[fresh], fitted["temperature"])
    return {
        "calibration": figures,
        "temperature": fitted["temperature"],
        "calibrated": calibration_figures(
            labels[fresh], scaled, CLASSES, groups=groups[fresh], seed=seed
        ),
    }


def write_result(
    directory: str | os.PathLike[str], problem: Problem | None = None
) -> dict[str, Any]:
    """Evaluate a finished run and leave ``result.json`` and ``predictions.npz`` in its folder.

    Returns:
        The content of result.json.

    Raises:
        SkinfastError: the run folder or its data cannot be used.
        OSError: the files cannot be written.
    """
    run = RunFolder(directory)
    metrics, problem, probabilities = evaluate_run(directory, problem=problem)
    dataset, test = problem.dataset, problem.split.test
    epochs = run.read_metrics(up_to_epoch=problem.config.epochs)
    if not epochs:
        raise SkinfastError(
            f"{run.metrics_file} has no finished epoch; train again with another --output"
        )
    result = {
        **metrics,
        "epochs": epochs[-1]["epoch"],
        "kept_epoch": _kept_epoch(epochs),
        "train_seconds": sum(epoch["seconds"] for epoch in epochs),
        "data": {
            "source": _source(problem),
            "num_images": len(dataset),
            "num_train": len(problem.train_indices),
            "num_test": len(test),
            "skipped": [list(entry) for entry in dataset.skipped],
            "class_counts": dataset.class_counts(),
            "class_counts_train": _class_counts(problem, problem.train_indices),
            "class_counts_test": _class_counts(problem, test),
        },
        "environment": environment(problem.device),
    }
    labels = dataset.labels[test].numpy()
    # Where lesions are not known every image counts as one of its own.
    lesion_ids = dataset.lesion_ids or dataset.image_ids
    sample_index = _sample_index(labels)
    with atomic_path(run.directory / "predictions.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            image_ids=np.array([dataset.image_ids[i] for i in test]),
            lesion_ids=np.array([lesion_ids[i] for i in test]),
            labels=labels,
            probabilities=probabilities.numpy(),
            sample_index=sample_index,
            sample_images=dataset.images[test[sample_index]].numpy(),
        )
    atomic_write_text(run.directory / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def predict(
    directory: str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str]],
    device: str = "auto",
    *,
    test_time_augmentation: bool | None = None,
) -> list[dict[str, Any]]:
    """Classify image files with a trained run, in the precision and by the backend of its settings.

    Args:
        directory: the run folder.
        images: the files.
        device: auto, cpu, cuda or cuda:N.
        test_time_augmentation: as for ``evaluate_run``.

    Returns:
        For each image ``{"image", "class", "probability", "probabilities": {class: p},
        "temperature"}``. The probabilities are calibrated where the run has a temperature that was
        fitted to such answers (see ``read_temperature``); where it has none, ``"temperature"`` is
        None and they are the model's.

    Raises:
        SkinfastError: the run folder or an image cannot be used.
    """
    chosen = choose_device(device)
    run = RunFolder(directory)
    settings = settings_of(run)
    model, description = load_model(run.model_file, chosen, settings.backend)
    _, batches = load_pictures(images, description, chosen, at_once=_IMAGES_AT_ONCE)
    if test_time_augmentation is None:
        test_time_augmentation = settings.test_time_augmentation
    if test_time_augmentation:
        model = MeanOverViews(model)
    logits = logits_of(model, batches, chosen, settings.precision)
    probabilities = torch.softmax(logits, 1).cpu().numpy()
    temperature = read_temperature(directory, test_time_augmentation)
    if temperature is not None:
        probabilities = with_temperature(probabilities, temperature)
    predictions = []
    for image, row in zip(images, probabilities.tolist(), strict=True):
        by_class = dict(zip(description.classes, row, strict=True))
        best = max(by_class, key=by_class.__getitem__)
        predictions.append(
            {
                "image": os.fspath(image),
                "class": best,
                "probability": by_class[best],
                "probabilities": by_class,
                "temperature": temperature,
            }
        )
    return predictions


def settings_of(run: RunFolder) -> TrainConfig:
    """The settings of a run; the defaults for a folder with the model alone, which predicts too."""
    return TrainConfig.load(run.config_file) if run.config_file.exists() else TrainConfig()


def load_pictures(
    images: Sequence[str | os.PathLike[str]],
    description: ModelDescription,
    device: torch.device,
    *,
    at_once: int,
) -> tuple[np.ndarray, DeviceBatches]:
    """Image files as a model takes them: uint8 ``[N, H, W, 3]``, and batches of ``at_once``.

    Raises:
        SkinfastError: an image cannot be used.
    """
    pixels = np.stack([_decode(Path(path), description.image_size) for path in images])
    batches = DeviceBatches(
        torch.from_numpy(pixels),
        torch.zeros(len(pixels), dtype=torch.int64),
        np.arange(len(pixels)),
        at_once,
        device=device,
        mean=description.mean,
        std=description.std,
        shuffle=False,
    )
    return pixels, batches


def _decode(path: Path, image_size: int) -> np.ndarray:
    try:
        return decode_image(path, image_size)
    except BadImageError as error:
        raise SkinfastError(f"{path}: {error}; give a JPEG or PNG photograph") from error


def _other_data(
    run: RunFolder, settings: TrainConfig, config: TrainConfig, description: ModelDescription
) -> tuple[Problem, str]:
    """Data that need not be such that the run's settings could split them; the images in words."""
    dataset: LesionDataset
    if config.data == "synthetic":
        dataset = SyntheticLesions(image_size=config.image_size)
    else:
        dataset = HAM10000(config.data, config.image_size, skip_bad_images=config.skip_bad_images)
    chosen, said = _unseen(run, settings, dataset)
    split = Split(np.flatnonzero(~chosen), np.flatnonzero(chosen))
    device = choose_device(config.device)
    problem = Problem(
        config, device, dataset, split, split.train, description.mean, description.std
    )
    return problem, said


def _unseen(
    run: RunFolder, settings: TrainConfig, dataset: LesionDataset
) -> tuple[npt.NDArray[np.bool_], str]:
    """Which images of other data did not train the model, bool ``[N]``, and the same in words."""
    names, source, tested = dataset.image_ids, dataset.source, _tested(run)
    chosen = np.array([name in tested for name in names])
    if chosen.any():
        count = int(chosen.sum())
        if count == len(tested):
            return chosen, f"the run's {count:,} test images, found in {source}"
        return chosen, (
            f"{count:,} of the run's {len(tested):,} test images; the others are not in {source}"
        )
    every = f"all {len(names):,} images of {source}"
    try:
        own = _names_of_own_data(settings)
    except (SkinfastError, OSError):
        return ~chosen, (
            f"{every}; whether some of them trained the model is not known, for the data of the "
            f"run, {settings.data}, cannot be read"
        )
    chosen = np.array([name not in own for name in names])
    if chosen.all():
        return chosen, f"{every}, none of them of the run's own data"
    if not chosen.any():
        raise SkinfastError(f"{source} has only images that trained the model; give others")
    return chosen, (
        f"{int(chosen.sum()):,} of the {len(names):,} images of {source}; the others trained the "
        "model"
    )


def _names_of_own_data(settings: TrainConfig) -> set[str]:
    """The names of all images that a run was given: those that it did not test, it learnt from.

    Raises:
        SkinfastError: the data are not where they were.
    """
    if settings.data == "synthetic":
        return set()
    records = find_records(settings.data, settings.image_size)
    return {record.image_id for record in records}


def _tested(run: RunFolder) -> set[str]:
    """The names of the run's test images."""
    path = run.directory / "predictions.npz"
    try:
        with np.load(path, allow_pickle=False) as archive:
            return set(archive["image_ids"].tolist())
    except (*BROKEN_NPZ, KeyError) as error:
        raise SkinfastError(
            f"{path} is missing, cut off or has no image ids ({error}); finish the run with "
            "`skinfast train --resume` or train again"
        ) from error


def _kept_epoch(epochs: Sequence[dict[str, Any]]) -> int:
    """The epoch whose weights the model has: the best in validation, else the last."""
    score = "validation_balanced_accuracy"
    if score not in epochs[-1]:
        return epochs[-1]["epoch"]
    return max(epochs, key=lambda epoch: epoch[score])["epoch"]  # the first of equals, as training


def _source(problem: Problem) -> str:
    if problem.config.data == "synthetic":
        return "synthetic lesions"
    return f"HAM10000 ({Path(problem.config.data).name})"


def _class_counts(problem: Problem, indices: np.ndarray) -> dict[str, int]:
    counts = np.bincount(problem.dataset.labels.numpy()[indices], minlength=len(CLASSES))
    return dict(zip(CLASSES, counts.tolist(), strict=True))


def _sample_index(labels: np.ndarray) -> np.ndarray:
    """The first few test images of each class."""
    picked = [np.flatnonzero(labels == c)[:_SAMPLES_PER_CLASS] for c in range(len(CLASSES))]
    return np.concatenate(picked).astype(np.int64)
