"""``skinfast evaluate``."""

from __future__ import annotations

import argparse
import json

from skinfast.cli.shared import Subparsers, add_command, print_metrics


def add(commands: Subparsers) -> None:
    command = add_command(
        commands,
        "evaluate",
        _run,
        "measure a trained run on its test images, or on other data",
        "skinfast evaluate runs/cnn --data data/ham10000",
    )
    command.add_argument("directory", metavar="RUN", help="the folder of a finished run")
    command.add_argument("--data", help="another data folder (default: the one of the run)")
    command.add_argument("--device", help="another device (default: the one of the run)")
    command.add_argument(
        "--test-time-augmentation",
        action=argparse.BooleanOptionalAction,
        help="take the mean probability over the 8 mirrored and turned views of an image, or not "
        "(default: as the run was evaluated)",
    )


def _run(options: argparse.Namespace) -> int:
    from skinfast.evaluation import evaluate_run

    metrics, _, _ = evaluate_run(
        options.directory,
        data=options.data,
        device=options.device,
        test_time_augmentation=options.test_time_augmentation,
    )
    if options.json:
        print(json.dumps(metrics, indent=2))
    else:
        print_metrics(metrics)
    return 0
