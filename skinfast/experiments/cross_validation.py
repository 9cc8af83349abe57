"""Repeated stratified k-fold cross-validation that keeps every lesion in one fold."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skinfast.errors import SkinfastError
from skinfast.evaluation.bootstrap import METRICS, Answers, Estimate, difference, estimates, measure
from skinfast.experiments.runs import NamedRun, Outcome, commits_of, run_all
from skinfast.experiments.tables import (
    METRIC_TITLES,
    as_json,
    figure,
    markdown_table,
    with_interval,
    write_outputs,
)
from skinfast.files import atomic_path
from skinfast.training import TrainConfig


def cross_validate(
    configs: Mapping[str, TrainConfig],
    output: str | os.PathLike[str],
    *,
    repeats: int = 1,
    jobs: int = 1,
    replicates: int = 1000,
    on_line: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train every configuration on every fold, and compare them on the same images.

    Fold k of repeat r is the test set of one training with seed ``config.seed + r``, which also
    draws the folds: scikit-learn's ``StratifiedGroupKFold`` over lesions. So all configurations
    with one seed meet the same folds, and after a repeat each has answered for every image once.
    Metrics are taken over all these answers together and averaged over repeats; intervals and
    comparisons draw lesions again (see ``skinfast.evaluation.bootstrap``). The intervals tell of
    the choice of lesions, not of the choice of training sets, which overlap.

    Args:
        configs: name to settings; ``split``, ``fold`` and ``seed`` of a run are set here.
        output: the folder. A second call with the same arguments goes on where the first stopped.
        repeats: how often the folds are drawn anew.
        jobs: processes that train at the same time.
        replicates: of the bootstrap.
        on_line: called with lines of progress.

    Returns:
        The content of ``cross_validation.json``. Beside it lie ``cross_validation.md`` and, for
        each configuration, ``out_of_fold_<name>.npz``: ``image_ids``, ``lesion_ids`` and
        ``labels`` ``[N]``, ``folds`` ``[repeats, N]`` and ``probabilities`` ``[repeats, N, C]``.

    Raises:
        SkinfastError: settings, data or output that cannot be used, or a training that diverged.
        OSError: the folder cannot be written.
    """
    if repeats < 1:
        raise SkinfastError(f"--repeats is {repeats}; it needs to be at least 1")
    if len({(c.seed, c.folds, c.data) for c in configs.values()}) != 1:
        raise SkinfastError("give every model the same --data, --seed and --folds: equal folds")
    folds = next(iter(configs.values())).folds
    runs = {
        (name, repeat, fold): NamedRun(
            f"{name}/repeat-{repeat}/fold-{fold}",
            dataclasses.replace(config, split="lesion", fold=fold, seed=config.seed + repeat),
        )
        for name, config in configs.items()
        for repeat in range(repeats)
        for fold in range(folds)
    }
    outcomes = run_all(list(runs.values()), output, jobs=jobs, on_line=on_line)
    if outcomes.diverged:
        name, reason = next(iter(outcomes.diverged.items()))
        raise SkinfastError(f"{name}: {reason}; folds without it are no cross-validation")

    by_fold = {key: outcomes.finished[run.name] for key, run in runs.items()}
    answers = {
        name: [_out_of_fold([by_fold[name, r, k] for k in range(folds)]) for r in range(repeats)]
        for name in configs
    }
    for name, of_repeats in answers.items():
        fold_of = [
            _fold_of(answer, [by_fold[name, r, k] for k in range(folds)])
            for r, answer in enumerate(of_repeats)
        ]
        _write_npz(Path(output) / f"out_of_fold_{name}.npz", of_repeats, fold_of)

    measured, drawn = estimates(answers, replicates=replicates)
    compared = {
        (one, other): difference(measured[one], measured[other], drawn[one], drawn[other])
        for one, other in itertools.combinations(configs, 2)
    }
    content = {
        "folds": folds,
        "repeats": repeats,
        "replicates": replicates,
        "models": {
            name: {
                "config": dataclasses.asdict(config),
                "metrics": as_json(measured[name]),
                "each_repeat": [measure([answer]) for answer in answers[name]],
                "each_fold": [
                    {
                        "repeat": repeat,
                        "fold": fold,
                        **{
                            metric: by_fold[name, repeat, fold].result[metric] for metric in METRICS
                        },
                    }
                    for repeat in range(repeats)
                    for fold in range(folds)
                ],
                "train_seconds": sum(
                    outcome.result["train_seconds"]
                    for key, outcome in by_fold.items()
                    if key[0] == name
                ),
                "commits": commits_of(o for key, o in by_fold.items() if key[0] == name),
            }
            for name, config in configs.items()
        },
        "comparisons": [
            {"first": one, "second": other, "difference": as_json(values)}
            for (one, other), values in compared.items()
        ],
        "environment": next(iter(by_fold.values())).result["environment"],
    }
    write_outputs(output, "cross_validation", content, _markdown(content, measured, compared))
    return content


def _out_of_fold(folds: Sequence[Outcome]) -> Answers:
    """The answers of one repeat's folds put together, in the order of image ids.

    Raises:
        SkinfastError: the folds do not hold every image once: the data changed in between.
    """
    parts = [outcome.answers for outcome in folds]
    names = np.concatenate([part.image_ids for part in parts])
    order = np.argsort(names, kind="stable")
    if len(np.unique(names)) != len(names) or len(names) != folds[0].result["data"]["num_images"]:
        raise SkinfastError(
            "the folds do not hold every image once, so the data changed since the first of them; "
            "choose another --output"
        )
    return Answers(
        names[order],
        np.concatenate([part.lesion_ids for part in parts])[order],
        np.concatenate([part.labels for part in parts])[order],
        np.concatenate([part.probabilities for part in parts])[order],
    )


def _fold_of(answers: Answers, folds: Sequence[Outcome]) -> npt.NDArray[np.int64]:
    """The fold in which each image was tested, ``[N]``."""
    fold_of = np.empty(len(answers.labels), np.int64)
    for fold, outcome in enumerate(folds):
        fold_of[np.searchsorted(answers.image_ids, outcome.answers.image_ids)] = fold
    return fold_of


def _write_npz(
    path: Path, repeats: Sequence[Answers], folds: Sequence[npt.NDArray[np.int64]]
) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            image_ids=repeats[0].image_ids,
            lesion_ids=repeats[0].lesion_ids,
            labels=repeats[0].labels,
            folds=np.stack(folds),
            probabilities=np.stack([answers.probabilities for answers in repeats]),
        )


def _markdown(
    content: dict[str, Any],
    measured: Mapping[str, Mapping[str, Estimate]],
    compared: Mapping[tuple[str, str], Mapping[str, Estimate]],
) -> str:
    head = ["", *METRIC_TITLES.values()]
    rows = []
    for name, values in measured.items():
        rows.append([name, *(with_interval(values[metric]) for metric in METRICS)])
        if content["repeats"] > 1:
            rows += [
                [f"repeat {number}", *(figure(repeat[metric]) for metric in METRICS)]
                for number, repeat in enumerate(content["models"][name]["each_repeat"])
            ]
    text = (
        f"{content['folds']}-fold cross-validation by lesion, stratified, repeats: "
        f"{content['repeats']}. Metrics are of all out-of-fold answers together; in brackets the "
        f"95% interval of {content['replicates']} bootstrap draws of lesions.\n\n"
        f"{markdown_table(head, rows)}\n"
    )
    if not compared:
        return text
    lines = [
        [
            f"{one} minus {other}",
            *(with_interval(values[metric], signed=True) for metric in METRICS),
        ]
        for (one, other), values in compared.items()
    ]
    return (
        f"{text}\nDifferences on the same folds and lesions. Where the interval excludes 0, the "
        "choice of lesions does not explain the difference.\n\n"
        f"{markdown_table(head, lines)}\n"
    )
