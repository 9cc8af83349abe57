"""``skinfast reproduce``."""

from __future__ import annotations

import argparse
from pathlib import Path

from skinfast.cli.settings import add_models
from skinfast.cli.shared import Subparsers, add_command, add_jobs, note, print_outputs


def add(commands: Subparsers) -> None:
    from skinfast.data.splits import SPLIT_KINDS
    from skinfast.training.config import PRECISIONS
    from skinfast.training.presets import PRESETS

    command = add_command(
        commands,
        "reproduce",
        _run,
        "fill the paper's two tables anew, and again on a split by lesion",
        "skinfast reproduce --data data/ham10000 --output runs/reproduction --seeds 5",
    )
    command.add_argument("--data", required=True, help="folder of HAM10000, or 'synthetic'")
    command.add_argument(
        "--output", required=True, metavar="DIR", help="the folder to make, or to go on in"
    )
    command.add_argument("--quick", action="store_true", help="one seed, few epochs: a first look")
    command.add_argument(
        "--seeds", type=int, default=3, help="trainings of each, averaged (default: 3)"
    )
    add_models(command)
    command.add_argument(
        "--image-size", type=int, nargs="+", default=(64, 32), help="(default: 64 32)"
    )
    command.add_argument(
        "--preset",
        nargs="+",
        choices=tuple(PRESETS),
        default=tuple(PRESETS),
        help="the paper's settings and good ones (default: both)",
    )
    command.add_argument(
        "--split",
        dest="splits",
        nargs="+",
        choices=SPLIT_KINDS,
        default=SPLIT_KINDS,
        help="the paper's, by image, and the honest one, by lesion (default: both)",
    )
    add_jobs(command)
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="(default: float32)"
    )
    command.add_argument(
        "--skip-bad-images", action="store_true", help="go on without images that cannot be read"
    )


def _run(options: argparse.Namespace) -> int:
    from skinfast.experiments import reproduce

    content = reproduce(
        options.data,
        options.output,
        seeds=options.seeds,
        quick=options.quick,
        models=options.models,
        image_sizes=options.image_size,
        presets=options.preset,
        splits=options.splits,
        settings={
            name: getattr(options, name) for name in ("device", "precision", "skip_bad_images")
        },
        jobs=options.jobs,
        on_line=note,
    )
    print_outputs(options, "reproduction", content)
    if not options.json:
        print(f"report: {Path(options.output) / 'reproduction.html'}")
    return 1 if any(cell["diverged"] for cell in content["cells"]) else 0
