"""``skinfast train``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from skinfast.cli.settings import add_settings, given_settings
from skinfast.cli.shared import Subparsers, add_command, note, note_epoch, print_metrics

if TYPE_CHECKING:
    from skinfast.training import Problem, TrainConfig


def add(commands: Subparsers) -> None:
    command = add_command(
        commands,
        "train",
        _run,
        "train a classifier and write a run folder with its report",
        "skinfast train --model cnn --data data/ham10000 --epochs 30 --output runs/cnn",
    )
    command.set_defaults(in_several_processes=True)
    command.epilog += (
        "; on N GPUs: torchrun --nproc-per-node=N -m skinfast train ... (also --device cpu), each "
        "of which has a part of every batch"
    )
    command.add_argument("--output", required=True, metavar="DIR", help="the run folder to make")
    command.add_argument("--resume", action="store_true", help="go on with the run in --output")
    add_settings(command)


def _run(options: argparse.Namespace) -> int:
    from skinfast.evaluation import write_result
    from skinfast.report import write_report
    from skinfast.training import prepare, train
    from skinfast.training.distributed import joined

    with joined() as processes:
        config = processes.from_first(lambda: _config(options))
        processes.take_gpu(config.device)
        problem = processes.one_ahead(lambda: prepare(config))
        if processes.is_first:
            _note_problem(problem, processes.count)
        train(config, options.output, resume=options.resume, problem=problem, on_epoch=note_epoch)
    if not processes.is_first:
        return 0
    result = write_result(options.output, problem)
    report = write_report(options.output)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_metrics(result)
        print(f"report: {report}")
    return 0


def _config(options: argparse.Namespace) -> TrainConfig:
    from skinfast.training import TrainConfig
    from skinfast.training.run_folder import RunFolder

    if options.resume:
        config = TrainConfig.load(RunFolder(options.output).config_file)
        return config.continued_by(given_settings(options, config.model))
    config = TrainConfig(**given_settings(options))
    RunFolder(options.output).check_new()
    return config


def _note_problem(problem: Problem, processes: int) -> None:
    config = problem.config
    together = f", {processes} processes" if processes > 1 else ""
    note(
        f"{config.model} on {problem.device}{together}: {len(problem.train_indices)} training and "
        f"{len(problem.split.test)} test images of {config.image_size}x{config.image_size}"
    )
    for image_id, reason in problem.dataset.skipped:
        note(f"skipped {image_id}: {reason}")
