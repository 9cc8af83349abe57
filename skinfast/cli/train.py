"""``skinfast train``."""

from __future__ import annotations

import argparse
import dataclasses
import json

from skinfast.cli.shared import Subparsers, add_command, note, note_epoch, print_metrics


def add(commands: Subparsers) -> None:
    from skinfast.training.config import TrainConfig, option

    command = add_command(
        commands,
        "train",
        _run,
        "train a classifier and write a run folder with its report",
        "skinfast train --model cnn --data data/ham10000 --epochs 30 --output runs/cnn",
    )
    command.add_argument("--output", required=True, metavar="DIR", help="the run folder to make")
    command.add_argument("--resume", action="store_true", help="go on with the run in --output")
    for setting in dataclasses.fields(TrainConfig):
        choices, help = setting.metadata["choices"], setting.metadata["help"]
        # No defaults here: TrainConfig holds them, and --resume must know what was given.
        if setting.type == "bool":
            command.add_argument(
                option(setting.name),
                action="store_true",
                default=argparse.SUPPRESS,
                help=help,
            )
            continue
        kind = {"int": int, "float": float, "str": str}[str(setting.type)]
        command.add_argument(
            option(setting.name),
            type=kind,
            choices=choices,
            default=argparse.SUPPRESS,
            metavar=None if choices else setting.name.upper(),
            help=f"{help} (default: {setting.default})",
        )


def _run(options: argparse.Namespace) -> int:
    from skinfast.evaluation import write_result
    from skinfast.report import write_report
    from skinfast.training import TrainConfig, prepare, train
    from skinfast.training.run_folder import RunFolder

    names = {setting.name for setting in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    if options.resume:
        config = TrainConfig.load(RunFolder(options.output).config_file).continued_by(given)
    else:
        config = TrainConfig(**given)
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
