"""The paper's tables again, beside its figures; and what they become when done properly."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from skinfast.data.classes import CLASSES
from skinfast.data.splits import SPLIT_KINDS
from skinfast.errors import SkinfastError
from skinfast.evaluation.bootstrap import METRICS, Answers, Estimate, difference, estimates, measure
from skinfast.experiments import reproduction_page
from skinfast.experiments.runs import NamedRun, Outcome, commits_of, run_all
from skinfast.experiments.tables import as_json, write_outputs
from skinfast.training import TrainConfig, preset

#: Tables 1 and 2 of the paper, by side of the images and model. Its F1 cannot be macro-averaged
#: beside that precision (macro F1 is at most 2P / (1 + P)), so it is read as the weighted one.
PAPER_TABLES: dict[int, dict[str, dict[str, float]]] = {
    64: {
        "logistic-regression": {"accuracy": 0.680, "f1_weighted": 0.629, "precision_macro": 0.311},
        "cnn": {"accuracy": 0.757, "f1_weighted": 0.688, "precision_macro": 0.351},
        "resnet50": {"accuracy": 0.713, "f1_weighted": 0.644, "precision_macro": 0.336},
    },
    32: {
        "logistic-regression": {"accuracy": 0.649, "f1_weighted": 0.651, "precision_macro": 0.250},
        "cnn": {"accuracy": 0.708, "f1_weighted": 0.687, "precision_macro": 0.387},
        "resnet50": {"accuracy": 0.698, "f1_weighted": 0.626, "precision_macro": 0.287},
    },
}

#: Epochs of a first look, which say little about a model and much about whether all works.
_QUICK_EPOCHS = {"logistic-regression": 5, "cnn": 5, "resnet50": 1}
_BY_WORK = tuple(_QUICK_EPOCHS)


class Cell(NamedTuple):
    """A place in the tables."""

    preset: str
    split: str
    image_size: int
    model: str

    @property
    def name(self) -> str:
        """Of the folder of its runs."""
        side = self.image_size
        return f"{self.preset}/split-by-{self.split}/{side}x{side}/{self.model}"


def reproduce(
    data: str,
    output: str | os.PathLike[str],
    *,
    seeds: int = 3,
    quick: bool = False,
    models: Sequence[str] = ("logistic-regression", "cnn", "resnet50"),
    image_sizes: Sequence[int] = (64, 32),
    presets: Sequence[str] = ("paper", "best"),
    splits: Sequence[str] = SPLIT_KINDS,
    settings: Mapping[str, Any] | None = None,
    jobs: int = 1,
    replicates: int = 1000,
    on_line: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Fill both tables of the paper anew: every model, size, split and preset, several seeds.

    A seed draws the split, the initial weights and the order of images. A figure is the mean over
    seeds; its interval draws lesions anew (see ``skinfast.evaluation.bootstrap``), together for
    all cells, so that the differences between a split by image and one by lesion, and those between
    two models, are paired.

    Args:
        data: folder of HAM10000, or "synthetic".
        output: the folder. A second call with the same arguments goes on where the first stopped.
        seeds: S; the seeds are 0 to S - 1.
        quick: one seed, the paper's preset and a few epochs, for a first look.
        models, image_sizes, presets, splits: a part of the tables.
        settings: of every run, such as ``device``, ``precision`` or ``skip_bad_images``.
        jobs: processes that train at the same time.
        replicates: of the bootstrap.
        on_line: called with lines of progress.

    Returns:
        The content of ``reproduction.json``; ``reproduction.md`` and ``reproduction.html`` show it.

    Raises:
        SkinfastError: settings, data or output that cannot be used, or every run diverged.
        OSError: the folder cannot be written.
    """
    if seeds < 1:
        raise SkinfastError(f"--seeds is {seeds}; it needs to be at least 1")
    if quick:
        seeds, presets = 1, ("paper",)
    # As in the paper, whatever the order of the options.
    models = [model for model in _BY_WORK if model in models]
    image_sizes = sorted(set(image_sizes), reverse=True)
    splits = [split for split in SPLIT_KINDS if split in splits]
    cells = [Cell._make(c) for c in itertools.product(presets, splits, image_sizes, models)]
    runs = {
        cell: [
            NamedRun(f"{cell.name}/seed-{seed}", _config(cell, data, seed, quick, settings or {}))
            for seed in range(seeds)
        ]
        for cell in cells
    }
    # The quickest first: there is soon something to look at, and mistakes show early.
    order = sorted(runs, key=lambda cell: (_BY_WORK.index(cell.model), cell.image_size))
    outcomes = run_all(
        [run for cell in order for run in runs[cell]], output, jobs=jobs, on_line=on_line
    )
    finished = {
        cell: [outcomes.finished[run.name] for run in group if run.name in outcomes.finished]
        for cell, group in runs.items()
    }
    if not any(finished.values()):
        name, reason = next(iter(outcomes.diverged.items()))
        raise SkinfastError(f"no run could be used; {name}: {reason}")

    first = next(group[0] for group in finished.values() if group).result
    measured, drawn = estimates(
        {cell.name: [o.answers for o in group] for cell, group in finished.items() if group},
        replicates=replicates,
    )

    def less(one: Cell, other: Cell) -> dict[str, Any]:
        a, b = one.name, other.name
        return as_json(difference(measured[a], measured[b], drawn[a], drawn[b]))

    def seeds_of(cell: Cell) -> list[int]:
        return [outcome.config.seed for outcome in finished[cell]]

    content = {
        "data": first["data"]["source"],
        "quick": quick,
        "seeds": seeds,
        "replicates": replicates,
        "class_counts": first["data"]["class_counts"],
        "cells": [_cell(cell, seeds, finished[cell], measured.get(cell.name)) for cell in runs],
        "majority": [{"split": split, "metrics": _majority(finished, split)} for split in splits],
        "leak": [
            {
                "preset": cell.preset,
                "image_size": cell.image_size,
                "model": cell.model,
                "difference": less(cell, other),
            }
            for cell in runs
            for other in [cell._replace(split="lesion")]
            if cell.split == "image" and {cell.name, other.name} <= measured.keys()
        ],
        "models": [
            {
                "preset": later.preset,
                "split": later.split,
                "image_size": later.image_size,
                "first": later.model,
                "second": earlier.model,
                "difference": less(later, earlier),
            }
            for earlier, later in itertools.combinations(runs, 2)
            if later == earlier._replace(model=later.model)
            # A seed draws the test images: of other seeds, the difference would be of other images.
            and seeds_of(earlier) == seeds_of(later) != []
        ],
        "environment": first["environment"],
    }
    write_outputs(output, "reproduction", content, reproduction_page.markdown(content))
    reproduction_page.write_page(output, content)
    return content


def _config(
    cell: Cell, data: str, seed: int, quick: bool, settings: Mapping[str, Any]
) -> TrainConfig:
    """The settings of one run of a cell."""
    values = {**preset(cell.preset, cell.model), **settings}
    values |= {"data": data, "split": cell.split, "image_size": cell.image_size, "seed": seed}
    if quick:
        values["epochs"] = _QUICK_EPOCHS[cell.model]
    return TrainConfig(**values)


def _cell(
    cell: Cell,
    seeds: int,
    outcomes: Sequence[Outcome],
    measured: Mapping[str, Estimate] | None,
) -> dict[str, Any]:
    tables = PAPER_TABLES if cell.split == "image" else {}
    paper = tables.get(cell.image_size, {}).get(cell.model)
    each = [measure([outcome.answers]) for outcome in outcomes]
    confusion = sum(np.array(outcome.result["confusion_matrix"]) for outcome in outcomes)
    return {
        **cell._asdict(),
        "paper": paper,
        "diverged": seeds - len(outcomes),
        "metrics": as_json(measured) if measured else None,
        "each_seed": each,
        "standard_deviation": {metric: _deviation(each, metric) for metric in METRICS},
        "confusion_matrix": np.asarray(confusion).tolist() if outcomes else None,
        "train_seconds": (
            float(np.mean([outcome.result["train_seconds"] for outcome in outcomes]))
            if outcomes
            else None
        ),
        "epochs": max((outcome.result["epochs"] for outcome in outcomes), default=None),
        "config": dataclasses.asdict(outcomes[0].config) if outcomes else None,
        "commits": commits_of(outcomes),
    }


def _deviation(each: Sequence[Mapping[str, float | None]], metric: str) -> float | None:
    """Of a metric over the seeds; None for one seed."""
    values = [one[metric] for one in each]
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None


def _majority(finished: Mapping[Cell, Sequence[Outcome]], split: str) -> dict[str, float | None]:
    """What always answering the commonest class scores on the test sets of a split."""
    # The test sets are equal for all cells of a split; one that has all its seeds serves.
    cell = max((c for c in finished if c.split == split), key=lambda c: len(finished[c]))
    if not finished[cell]:
        return dict.fromkeys(METRICS)
    return measure([_always_the_commonest(outcome.answers) for outcome in finished[cell]])


def _always_the_commonest(answers: Answers) -> Answers:
    commonest = np.bincount(answers.labels, minlength=len(CLASSES)).argmax()
    certain = np.eye(len(CLASSES))[np.full(len(answers.labels), commonest)]
    return dataclasses.replace(answers, probabilities=certain)
