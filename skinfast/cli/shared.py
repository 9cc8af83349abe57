"""What the commands share: how one is declared, what all refuse, how figures become lines."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from skinfast.errors import SkinfastError

#: What ``argparse`` returns from ``add_subparsers``; it has no public type.
Subparsers = Any


def add_command(commands: Subparsers, name: str, run: Any, help: str, example: str) -> Any:
    """Declare a command that ``run`` carries out; return its parser, to which options are added."""
    command = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example: {example}",
    )
    command.set_defaults(run=run, in_several_processes=False)
    command.add_argument("--json", action="store_true", help="print the figures as JSON")
    return command


def add_jobs(command: Any) -> None:
    """Add ``--jobs`` to a command of many trainings."""
    command.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="trainings at the same time, dealt to the GPUs in turn; several may share one "
        "(default: 1)",
    )


def check_output(directory: str | None) -> None:
    """Refuse an ``--output`` that cannot be a folder, before hours are spent.

    Raises:
        SkinfastError: it is a file.
    """
    if directory is not None and Path(directory).is_file():
        raise SkinfastError(f"{directory} is a file; choose another --output")


def check_seed(seed: int) -> None:
    """Refuse a ``--seed`` that no generator takes.

    Raises:
        SkinfastError: it is out of range.
    """
    if not 0 <= seed < 2**32:
        raise SkinfastError(f"--seed is {seed}; it needs to be from 0 to 2**32 - 1")


def note(line: str) -> None:
    """Tell of progress, on stderr: stdout is for figures alone."""
    print(line, file=sys.stderr, flush=True)


def note_epoch(epoch: dict[str, Any]) -> None:
    """Tell of a finished epoch, a line of metrics.jsonl."""
    score = epoch.get("validation_balanced_accuracy")
    validation = "" if score is None else f"validation balanced accuracy {score:.4f}, "
    note(
        f"epoch {epoch['epoch']}: train loss {epoch['train_loss']:.4f} "
        f"accuracy {epoch['train_accuracy']:.4f}, test loss {epoch['test_loss']:.4f} "
        f"accuracy {epoch['test_accuracy']:.4f}, {validation}{epoch['seconds']:.1f} s, "
        f"{epoch['images_per_second']:.0f} images/s"
    )


def print_metrics(result: dict[str, Any]) -> None:
    """Print what ``evaluate_run`` measured: a table, two lines, two or three on calibration.

    Of other data than the run's own, first which images of it.
    """
    if "test_images" in result:
        print(f"test images: {result['test_images']}")
    print(f"{'class':<8}{'recall':>8}{'precision':>11}{'F1':>8}{'AUC':>8}{'support':>9}")
    for row in result["per_class"]:
        auc = f"{row['auc']:8.3f}" if row["auc"] is not None else f"{'-':>8}"
        print(
            f"{row['name']:<8}{row['recall']:8.3f}{row['precision']:11.3f}{row['f1']:8.3f}{auc}"
            f"{row['support']:9d}"
        )
    auc = f"{result['auc_macro']:.4f}" if result["auc_macro"] is not None else "-"
    print(
        f"accuracy {result['accuracy']:.4f} (always the commonest class: "
        f"{result['majority_accuracy']:.4f}), balanced accuracy {result['balanced_accuracy']:.4f}\n"
        f"F1 weighted {result['f1_weighted']:.4f}, macro {result['f1_macro']:.4f}; precision macro "
        f"{result['precision_macro']:.4f}; AUC macro {auc}"
    )
    _print_calibration(result)


def _print_calibration(metrics: dict[str, Any]) -> None:
    from skinfast.report.calibration import INTERVAL_COVERAGE

    for name, key in (("as trained", "calibration"), ("calibrated", "calibrated")):
        if key in metrics:
            figures = metrics[key]
            low, high = figures["interval"]
            temperature = (
                f" with temperature {metrics['temperature']:.3f}" if key == "calibrated" else ""
            )
            print(
                f"probabilities {name}{temperature}: calibration error "
                f"{figures['expected_calibration_error']:.4f} ({low:.4f} to {high:.4f}), "
                f"confidence {figures['mean_confidence']:.4f} for accuracy "
                f"{figures['accuracy']:.4f} on {figures['num_images']} images"
            )
    if "calibration" in metrics:
        print(INTERVAL_COVERAGE)


def print_outputs(options: argparse.Namespace, name: str, content: dict[str, Any]) -> None:
    """Print an experiment's content as JSON, or the Markdown that it wrote."""
    if options.json:
        print(json.dumps(content, indent=2))
    else:
        print((Path(options.output) / f"{name}.md").read_text(encoding="utf-8"), end="")
