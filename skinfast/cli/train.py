"""``skinfast train``."""

from __future__ import annotations

import argparse
import json

from skinfast.cli.settings import add_settings, given_settings
from skinfast.cli.shared import Subparsers, add_command, note, note_epoch, print_metrics


def add(commands: Subparsers) -> None:
    command = add_command(
        commands,
        "train",
        _run,
        "train a classifier and write a run folder with its report",
        "skinfast train --model cnn --data data/ham10000 --epochs 30 --output runs/cnn",
    )
    command.add_argument("--output", required=True, metavar="DIR", help="the run folder to make")
    command.add_argument("--resume", action="store_true", help="go on with the run in --output")
    add_settings(command)


def _run(options: argparse.Namespace) -> int:
    from skinfast.evaluation import write_result
    from skinfast.report import write_report
    from skinfast.training import TrainConfig, prepare, train
    from skinfast.training.run_folder import RunFolder

    if options.resume:
        config = TrainConfig.load(RunFolder(options.output).config_file)
        config = config.continued_by(given_settings(options, config.model))
    else:
        config = TrainConfig(**given_settings(options))
        RunFolder(options.output).check_new()
    problem = prepare(config)
    note(
        f"{config.model} on {problem.device}: {len(problem.train_indices)} training and "
        f"{len(problem.split.test)} test images of {config.image_size}x{config.image_size}"
    )
    for image_id, reason in problem.dataset.skipped:
        note(f"skipped {image_id}: {reason}")
    train(config, options.output, resume=options.resume, problem=problem, on_epoch=note_epoch)
    result = write_result(options.output, problem)
    report = write_report(options.output)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_metrics(result)
        print(f"report: {report}")
    return 0
