"""Collect finished runs into one JSON file and print them as the table that the README shows.

python bench/summarise_runs.py runs/a runs/b --output bench/results/ham10000.json
python bench/summarise_runs.py --from bench/results/ham10000.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from skinfast.environment import commit_of
from skinfast.files import atomic_write_text

FIGURES = (
    "accuracy",
    "balanced_accuracy",
    "f1_weighted",
    "f1_macro",
    "precision_macro",
    "auc_macro",
    "majority_accuracy",
)
TITLES = {"resnet50": "ResNet-50", "cnn": "CNN", "logistic-regression": "logistic regression"}


def summarise(run: Path) -> dict[str, Any]:
    """The configuration and the figures of one finished run."""
    config = json.loads((run / "config.json").read_text())
    result = json.loads((run / "result.json").read_text())
    config["data"] = Path(config["data"]).name
    return {
        "config": config,
        **{name: result[name] for name in FIGURES},
        "train_seconds": result["train_seconds"],
        "per_class": result["per_class"],
        "environment": result["environment"],
    }


def table(runs: list[dict[str, Any]]) -> str:
    """The runs as a Markdown table, after the row of always answering the commonest class."""
    lines = [
        "| model | images | epochs | accuracy | balanced accuracy | F1 macro | AUC macro |",
        "|---|---|---|---|---|---|---|",
        f"| always nv | | | {runs[0]['majority_accuracy']:.4f} | {1 / 7:.4f} | | 0.5000 |",
    ]
    lines += [
        f"| {TITLES[run['config']['model']]} | {run['config']['image_size']}x"
        f"{run['config']['image_size']} | {run['config']['epochs']} | {run['accuracy']:.4f} | "
        f"{run['balanced_accuracy']:.4f} | {run['f1_macro']:.4f} | {run['auc_macro']:.4f} |"
        for run in runs
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="run folders, in the table's order")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--from", dest="source", type=Path, help="print the table of this file")
    options = parser.parse_args()
    if options.source:
        runs = json.loads(options.source.read_text())["runs"]
    else:
        runs = [summarise(run) for run in options.runs]
    if options.output:
        commit = commit_of(Path(__file__).resolve().parents[1])
        text = json.dumps({"commit": commit, "runs": runs}, indent=2)
        atomic_write_text(options.output, text + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
