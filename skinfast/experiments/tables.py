"""Figures as the cells of a table, and tables as Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skinfast.evaluation.bootstrap import Estimate
from skinfast.files import atomic_write_text

MODEL_TITLES = {
    "resnet50": "ResNet-50",
    "cnn": "CNN",
    "logistic-regression": "logistic regression",
}

METRIC_TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1_weighted": "F1 weighted",
    "f1_macro": "F1 macro",
    "precision_macro": "precision macro",
    "auc_macro": "AUC macro",
}


def figure(value: float | None, missing: str = "n/a") -> str:
    """A figure with three decimals."""
    return missing if value is None else f"{value:.3f}"


def with_interval(estimate: Estimate, signed: bool = False) -> str:
    """A figure with its interval, such as ``0.712 [0.690, 0.734]``."""
    if estimate.value is None:
        return "n/a"
    form = "{:+.3f} [{:+.3f}, {:+.3f}]" if signed else "{:.3f} [{:.3f}, {:.3f}]"
    return form.format(estimate.value, estimate.low, estimate.high)


def goal(value: float | None, reached: float | None) -> str:
    """A figure to be reached and whether it was, such as ``0.680, met``; empty if there is none."""
    if value is None:
        return ""
    met = reached is not None and reached >= value
    return f"{figure(value)}, {'met' if met else 'missed'}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_json(values: Mapping[str, Estimate]) -> dict[str, Any]:
    """Estimates by name, ready for JSON."""
    return {name: value.as_json() for name, value in values.items()}


def write_outputs(
    directory: str | os.PathLike[str], name: str, content: Mapping[str, Any], markdown: str
) -> None:
    """Write ``name.json`` and ``name.md`` into an experiment's folder.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    atomic_write_text(directory / f"{name}.json", text)
    atomic_write_text(directory / f"{name}.md", markdown.rstrip() + "\n")
