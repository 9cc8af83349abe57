"""``skinfast cross-validate``."""

from __future__ import annotations

import argparse

from skinfast.cli.settings import add_models, add_settings, configs_of
from skinfast.cli.shared import Subparsers, add_command, add_jobs, note, print_outputs


def add(commands: Subparsers) -> None:
    command = add_command(
        commands,
        "cross-validate",
        _run,
        "measure and compare models by k-fold cross-validation over lesions",
        "skinfast cross-validate --model cnn logistic-regression --data data/ham10000 "
        "--folds 5 --repeats 2 --output runs/folds",
    )
    command.add_argument(
        "--output", required=True, metavar="DIR", help="the folder to make, or to go on in"
    )
    add_models(command)
    command.add_argument("--repeats", type=int, default=1, help="draws of the folds (default: 1)")
    add_jobs(command)
    # A fold chooses these itself.
    add_settings(command, leave_out=("model", "split", "fold", "sync_batch_norm"))


def _run(options: argparse.Namespace) -> int:
    from skinfast.experiments import cross_validate

    content = cross_validate(
        configs_of(options, {"split": "lesion"}),
        options.output,
        repeats=options.repeats,
        jobs=options.jobs,
        on_line=note,
    )
    print_outputs(options, "cross_validation", content)
    return 0
