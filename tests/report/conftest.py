"""A run folder such as training leaves, made up but self-consistent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skinfast.evaluation import calibration_figures, classification_metrics
from skinfast.evaluation.calibration import with_temperature
from skinfast.evaluation.temperature import checksum

CLASSES = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
TEST_COUNTS = [65, 103, 220, 23, 223, 1341, 28]
TRAIN_COUNTS = [262, 411, 879, 92, 890, 5364, 114]

MakeRun = Callable[..., Path]


def write_run(
    directory: Path,
    num_epochs: int = 20,
    num_samples: int = 12,
    class_names: list[str] = CLASSES,
    image_ids: Callable[[int], str] = "ISIC_{:07d}".format,
    source: str = "HAM10000, folder ham10000",
    skipped: tuple[tuple[str, str], ...] = (("ISIC_0031234", "the file is cut off"),),
    temperature: float | None = None,
) -> Path:
    rng = np.random.default_rng(0)
    labels = np.arange(7).repeat(TEST_COUNTS)
    logits = 1.1 * rng.normal(size=(len(labels), 7)) + 1.2 * np.eye(7)[labels]
    logits[:, 5] += 2.2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    config = {
        "model": "resnet50",
        "data": "/data/ham10000",
        "image_size": 64,
        "epochs": num_epochs,
        "batch_size": 128,
        "lr": 0.01,
        "split": "image",
        "seed": 0,
        "device": "cuda",
        "precision": "bfloat16",
        "resume": False,
        "save_every": None,
    }
    epochs = [
        {
            "epoch": epoch,
            "train_loss": 0.25 + 0.9 * 0.85**epoch,
            "train_accuracy": 0.92 - 0.3 * 0.85**epoch,
            "test_loss": 0.72 + 0.5 * 0.75**epoch + 0.03 * float(rng.normal()),
            "test_accuracy": 0.76 - 0.15 * 0.8**epoch + 0.01 * float(rng.normal()),
            "learning_rate": 0.01,
            "seconds": 1.9,
            "images_per_second": 4200.0 + epoch,
        }
        for epoch in range(1, num_epochs + 1)
    ]
    result = {
        **classification_metrics(labels, probabilities, class_names),
        "calibration": calibration_figures(labels, probabilities, class_names),
        "environment": {
            "skinfast": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "device": "NVIDIA H100 80GB HBM3",
            "threads": 16,
        },
        "data": {
            "source": source,
            "num_images": sum(TRAIN_COUNTS) + sum(TEST_COUNTS),
            "num_train": sum(TRAIN_COUNTS),
            "num_test": sum(TEST_COUNTS),
            "skipped": skipped,
            "class_counts_train": dict(zip(class_names, TRAIN_COUNTS, strict=True)),
            "class_counts_test": dict(zip(class_names, TEST_COUNTS, strict=True)),
        },
        "train_seconds": 41.23,
        "epochs": num_epochs,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs))
    (directory / "result.json").write_text(json.dumps(result))

    if temperature is not None:
        write_calibration(directory, temperature, labels, probabilities, class_names)

    index = np.sort(rng.choice(len(labels), size=num_samples, replace=False))
    np.savez_compressed(
        directory / "predictions.npz",
        image_ids=np.array([image_ids(24000 + i) for i in range(len(labels))]),
        labels=labels,
        probabilities=probabilities.astype(np.float32),
        sample_index=index,
        sample_images=np.stack([blob(rng) for _ in index]) if num_samples else blob(rng)[:0, None],
    )
    return directory


def write_calibration(
    directory: Path,
    temperature: float,
    labels: np.ndarray[Any, np.dtype[np.int64]],
    probabilities: np.ndarray[Any, np.dtype[np.float64]],
    class_names: list[str],
) -> None:
    """``calibration.json``, for every second image, and weights for it to belong to."""
    weights = directory / "model.safetensors"
    weights.write_bytes(b"weights")
    before, after = (
        calibration_figures(labels[1::2], p[1::2], class_names)
        for p in (probabilities, with_temperature(probabilities, temperature))
    )
    calibration = {
        "temperature": temperature,
        "num_fitted": len(labels[::2]),
        "num_measured": len(labels[1::2]),
        "grouped_by_lesion": True,
        "lesions_shared_with_training": 707,
        "before": before,
        "after": after,
        "test_time_augmentation": False,
        "model_sha256": checksum(weights),
        "fitted_image_ids": [],
    }
    (directory / "calibration.json").write_text(json.dumps(calibration))


def blob(rng: np.random.Generator, size: int = 64) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A brown spot on skin, uint8 ``[size, size, 3]``."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle = np.arctan2(y, x)
    radius = 0.2 + 0.1 * rng.random() + 0.03 * np.sin(3 * angle + 6 * rng.random())
    inside = 1 / (1 + np.exp((np.hypot(x, y) - radius) * 40))[..., None]
    skin, spot = (
        np.array([222.0, 170.0, 150.0]),
        np.array([110.0, 70.0, 50.0]) * (0.6 + 0.8 * rng.random()),
    )
    noisy = skin * (1 - inside) + spot * inside + rng.normal(scale=6, size=(size, size, 3))
    return noisy.clip(0, 255).astype(np.uint8)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``write_run`` into a fresh folder."""
    return lambda **changes: write_run(tmp_path / "run", **changes)
