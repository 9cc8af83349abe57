"""``skinfast imbalance``."""

from __future__ import annotations

import argparse

from skinfast.cli.settings import add_models, add_setting, add_settings, configs_of
from skinfast.cli.shared import Subparsers, add_command, add_jobs, note, print_outputs


def add(commands: Subparsers) -> None:
    from skinfast.experiments.imbalance import IMBALANCE_SETTINGS

    command = add_command(
        commands,
        "imbalance",
        _run,
        "compare ways to deal with uneven classes: sampling, weights, focal loss",
        "skinfast imbalance --model cnn --data data/ham10000 --epochs 30 --output runs/imbalance",
    )
    command.add_argument(
        "--output", required=True, metavar="DIR", help="the folder to make, or to go on in"
    )
    add_models(command)
    command.add_argument(
        "--seeds", type=int, default=1, help="trainings of each, averaged (default: 1)"
    )
    add_jobs(command)
    add_setting(command, "split", default="lesion")
    add_settings(command, leave_out=("model", "split", "sync_batch_norm", *IMBALANCE_SETTINGS))


def _run(options: argparse.Namespace) -> int:
    from skinfast.experiments import compare_imbalance_methods

    content = compare_imbalance_methods(
        # By lesion unless told otherwise, whatever a preset says: over-sampled copies of a lesion
        # would leak even more.
        configs_of(options, {"split": getattr(options, "split", "lesion")}),
        options.output,
        seeds=options.seeds,
        jobs=options.jobs,
        on_line=note,
    )
    print_outputs(options, "imbalance", content)
    return 1 if any(row["diverged"] for row in content["rows"]) else 0
