"""The reproduction as Markdown and as one HTML file, from what reproduction.json holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skinfast.data.classes import CLASS_NAMES
from skinfast.evaluation.bootstrap import Estimate
from skinfast.experiments.tables import (
    METRIC_TITLES,
    MODEL_TITLES,
    figure,
    goal,
    markdown_table,
    with_interval,
)
from skinfast.files import atomic_write_text
from skinfast.report.html import duration, page

#: Said beside the tables, in both formats.
NOTES = (
    "The paper's F1 is held against the weighted one: a macro-averaged F1 is at most "
    "2P / (1 + P) for a macro-averaged precision P, and all six of the paper's columns break that.",
    "The paper says neither its batch size (here 64) nor the epochs of its logistic regression "
    "(here 20), how images are scaled (here Lanczos) or weights initialised (here as PyTorch "
    "does, in ResNet-50 as He et al.). Its g = 0.99 is taken for Adam's second decay rate.",
    "The intervals tell of the choice of lesions. How far trainings differ from seed to seed "
    "stands in reproduction.json.",
    "A figure of the paper is met where ours, the mean over seeds, is at least as high.",
    "A split by image has photographs of one lesion on both sides, so its test figures flatter. "
    "A split by lesion has not.",
    "Differences are of the same draws of lesions. Where an interval excludes 0, the choice of "
    "lesions hardly explains the difference; of twenty intervals one does so by chance.",
)

_PRESET_TITLES = {"paper": "the paper's settings", "best": "good settings"}


def sections(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tables: one for each preset, split and image size, in the order of the cells."""
    keys = dict.fromkeys((c["preset"], c["split"], c["image_size"]) for c in content["cells"])
    for preset, split, image_size in keys:
        cells = [
            cell
            for cell in content["cells"]
            if (cell["preset"], cell["split"], cell["image_size"]) == (preset, split, image_size)
        ]
        (majority,) = [m["metrics"] for m in content["majority"] if m["split"] == split]
        is_papers_own = preset == "paper" and split == "image"
        yield {
            "title": f"{image_size}x{image_size} pixels, split by {split}, "
            f"{_PRESET_TITLES.get(preset, preset)}",
            "table": {64: "Table 1", 32: "Table 2"}.get(image_size) if is_papers_own else None,
            "cells": cells,
            "majority": majority,
        }


def differences(content: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The tables of paired differences: what they show, and rows with ``name`` and ``where``."""

    def where(row: dict[str, Any]) -> str:
        side = row["image_size"]
        return f"{side}x{side}, {_PRESET_TITLES.get(row['preset'], row['preset'])}"

    leak = [
        {**row, "name": MODEL_TITLES[row["model"]], "where": where(row)} for row in content["leak"]
    ]
    models = [
        {
            **row,
            "name": f"{MODEL_TITLES[row['first']]} less {MODEL_TITLES[row['second']]}",
            "where": f"{where(row)}, split by {row['split']}",
        }
        for row in content.get("models", ())  # older files have none
    ]
    if leak:
        yield "What the split by image adds: its figures less those of the split by lesion", leak
    if models:
        yield "Models against each other, on the same test images", models


def markdown(content: dict[str, Any]) -> str:
    """All tables as Markdown."""
    parts = ["# The paper's tables, measured anew", _lede(content)]
    head = ["", *METRIC_TITLES.values(), "epochs", "training"]
    for section in sections(content):
        rows = [
            [
                "always the commonest",
                *(figure(section["majority"][m]) for m in METRIC_TITLES),
                "",
                "",
            ]
        ]
        for cell in section["cells"]:
            name = MODEL_TITLES[cell["model"]]
            if cell["metrics"] is None:
                rows.append([name, *["diverged"] * len(METRIC_TITLES), "", ""])
                continue
            figures = [
                with_interval(Estimate(**cell["metrics"][metric])) for metric in METRIC_TITLES
            ]
            rows.append([name, *figures, str(cell["epochs"]), duration(cell["train_seconds"])])
            if cell["paper"]:
                figures = [
                    goal(cell["paper"].get(metric), cell["metrics"][metric]["value"])
                    for metric in METRIC_TITLES
                ]
                rows.append([f"{name}, the paper", *figures, "", ""])
        title = f"{section['table']}: {section['title']}" if section["table"] else section["title"]
        parts += [f"## {title}", markdown_table(head, rows)]
    for heading, pairs in differences(content):
        lines = [
            [
                f"{row['name']}, {row['where']}",
                *(
                    with_interval(Estimate(**row["difference"][metric]), signed=True)
                    for metric in METRIC_TITLES
                ),
            ]
            for row in pairs
        ]
        parts += [f"## {heading}", markdown_table(["", *METRIC_TITLES.values()], lines)]
    total = sum(content["class_counts"].values())
    rows = [
        [f"{CLASS_NAMES.get(name, name)} ({name})", str(count), f"{count / total:.1%}"]
        for name, count in content["class_counts"].items()
    ]
    parts += ["## Distribution of the classes", markdown_table(["class", "images", "share"], rows)]
    parts += ["## Notes", "\n".join(f"- {note}" for note in NOTES)]
    return "\n\n".join(parts) + "\n"


def write_page(directory: str | os.PathLike[str], content: dict[str, Any]) -> Path:
    """Write ``reproduction.html``: one file, without scripts or outside resources.

    Returns:
        Its path.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    text = page(
        "reproduction.html.j2",
        content=content,
        lede=_lede(content),
        notes=NOTES,
        sections=list(sections(content)),
        metric_titles=METRIC_TITLES,
        model_titles=MODEL_TITLES,
        differences=list(differences(content)),
        class_names=CLASS_NAMES,
        goal=goal,
    )
    path = Path(directory) / "reproduction.html"
    # A path that is not UTF-8 arrives as lone surrogates, which no file can hold.
    atomic_write_text(path, text.encode("utf-8", "replace").decode("utf-8"))
    return path


def _lede(content: dict[str, Any]) -> str:
    num_images = sum(content["class_counts"].values())
    seeds = content["seeds"]
    text = (
        f"{content['data']}, {num_images:,} images. Each figure is "
        + (
            "one training"
            if seeds == 1
            else f"the mean of {seeds} trainings with seeds of their own"
        )
        + f", with the 95% interval of {content['replicates']:,} bootstrap draws of lesions."
    )
    if content["quick"]:
        text += (
            " This was a first look with few epochs: it shows that everything works, "
            "not what the models can."
        )
    return text
