"""``skinfast predict``."""

from __future__ import annotations

import argparse
import json

from skinfast.cli.shared import Subparsers, add_command


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
        action="store_true",
        help="take the mean probability over the 8 mirrored and turned views of an image",
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
    return 0
