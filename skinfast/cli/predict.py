"""``skinfast predict``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from skinfast.cli.shared import Subparsers, add_command, note


def add(commands: Subparsers) -> None:
    command = add_command(
        commands,
        "predict",
        _run,
        "classify image files with a trained run (not a diagnostic device)",
        "skinfast predict runs/cnn lesion.jpg",
    )
    command.add_argument("directory", metavar="RUN", help="the folder of a finished run")
    command.add_argument("images", metavar="IMAGE", nargs="+", help="JPEG or PNG files")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument(
        "--test-time-augmentation",
        action=argparse.BooleanOptionalAction,
        help="take the mean probability over the 8 mirrored and turned views of an image, or not "
        "(default: as the run was evaluated)",
    )


def _run(options: argparse.Namespace) -> int:
    from skinfast.data import CLASS_NAMES
    from skinfast.evaluation import predict

    predictions = predict(
        options.directory,
        options.images,
        options.device,
        test_time_augmentation=options.test_time_augmentation,
    )
    if options.json:
        print(json.dumps(predictions, indent=2))
        return 0
    for prediction in predictions:
        name = prediction["class"]
        print(
            f"{prediction['image']}: {name} ({CLASS_NAMES.get(name, name)}), "
            f"probability {prediction['probability']:.3f}"
        )
    note(_whose_probabilities(options.directory, predictions[0]["temperature"]))
    return 0


def _whose_probabilities(directory: str, temperature: float | None) -> str:
    from skinfast.evaluation.temperature import FILE_NAME, read_calibration

    if temperature is not None:
        return f"probabilities are calibrated with the run's temperature, {temperature:.3f}"
    fitted = read_calibration(directory)
    if fitted is not None:
        views = "with" if fitted["test_time_augmentation"] else "without"
        return (
            "probabilities are the model's own: the run's temperature was fitted "
            f"{views} test-time augmentation"
        )
    if (Path(directory) / FILE_NAME).exists():
        return (
            "probabilities are the model's own: the run's temperature belongs to weights that it "
            f"had before; `skinfast calibrate {directory}` fits it again"
        )
    return (
        "probabilities are the model's own, not calibrated; "
        f"`skinfast calibrate {directory}` fits a temperature"
    )
