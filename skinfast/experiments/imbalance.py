"""Ways to deal with uneven classes, side by side: the paper's four and three newer ones."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from skinfast.data.classes import CLASSES
from skinfast.environment import environment
from skinfast.errors import SkinfastError
from skinfast.evaluation.bootstrap import Answers, Estimate, estimates
from skinfast.experiments.runs import NamedRun, commits_of, run_all
from skinfast.experiments.tables import (
    MODEL_TITLES,
    as_json,
    figure,
    markdown_table,
    with_interval,
    write_outputs,
)
from skinfast.training import TrainConfig

#: The settings that each method changes; the others stay equal, if not the steps of an epoch. The
#: paper tried the first four; focal loss is Lin et al.'s (2017) and knows no label smoothing.
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "under-sampling": {"sampling": "under"},
    "over-sampling": {"sampling": "over"},
    "both": {"sampling": "both"},
    "class weights": {"class_weights": True},
    "focal loss": {"loss": "focal", "label_smoothing": 0.0},
    "balanced batches": {"balanced_batches": True},
}

#: The settings that say how classes are evened out, which a caller leaves as they are.
IMBALANCE_SETTINGS = ("sampling", "class_weights", "loss", "balanced_batches")

SPECIFICITIES = (0.90, 0.95)


def compare_imbalance_methods(
    configs: Mapping[str, TrainConfig],
    output: str | os.PathLike[str],
    *,
    seeds: int = 1,
    jobs: int = 1,
    replicates: int = 1000,
    on_line: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train every configuration with each of ``METHODS``, and measure what they gain.

    Args:
        configs: name to settings, those of ``IMBALANCE_SETTINGS`` at their defaults.
        output: the folder. A second call with the same arguments goes on where the first stopped.
        seeds: trainings of each, with seeds from ``config.seed``; figures are their means.
        jobs: processes that train at the same time.
        replicates: of the bootstrap over lesions.
        on_line: called with lines of progress.

    Returns:
        The content of ``imbalance.json``; ``imbalance.md`` holds it as a table.

    Raises:
        SkinfastError: settings, data or output that cannot be used.
        OSError: the folder cannot be written.
    """
    if seeds < 1:
        raise SkinfastError(f"--seeds is {seeds}; it needs to be at least 1")
    runs = {
        (name, method): [
            NamedRun(
                f"{name}/{method.replace(' ', '-')}/seed-{seed}",
                dataclasses.replace(config, **changes, seed=seed),
            )
            for seed in range(config.seed, config.seed + seeds)
        ]
        for name, config in configs.items()
        for method, changes in METHODS.items()
    }
    outcomes = run_all([r for group in runs.values() for r in group], output, jobs=jobs,
                       on_line=on_line)  # fmt: skip
    finished = {
        key: [outcomes.finished[run.name] for run in group if run.name in outcomes.finished]
        for key, group in runs.items()
    }
    measured: dict[tuple[str, str], dict[str, Estimate]] = {}
    for name in configs:
        # The lesions are drawn for the methods of a model together: their intervals compare.
        answers = {m: [o.answers for o in finished[name, m]] for m in METHODS if finished[name, m]}
        if answers:
            by_method, _ = estimates(answers, replicates=replicates)
            measured |= {(name, method): values for method, values in by_method.items()}
    rows = [
        {
            "model": name,
            "method": method,
            "config": dataclasses.asdict(dataclasses.replace(configs[name], **METHODS[method])),
            "diverged": seeds - len(group),
            "metrics": as_json(measured[name, method]) if group else None,
            "melanoma_recall": {
                f"{specificity:.2f}": melanoma_recall([o.answers for o in group], specificity)
                for specificity in SPECIFICITIES
            },
            "commits": commits_of(group),
        }
        for (name, method), group in finished.items()
    ]
    first = next(iter(outcomes.finished.values()), None)
    content = {
        "seeds": seeds,
        "replicates": replicates,
        "rows": rows,
        "environment": first.result["environment"] if first else environment(),
    }
    split = next(iter(configs.values())).split
    write_outputs(output, "imbalance", content, _markdown(content, measured, split))
    return content


def melanoma_recall(sets: Sequence[Answers], specificity: float) -> float | None:
    """The share of melanomas found at the threshold that clears ``specificity`` of the rest.

    An image is called melanoma when its probability of it reaches a threshold; of the thresholds
    that keep the specificity, the one with the highest recall is taken. Mean over the sets; None
    where no set has both melanomas and others.

    Source: scikit-learn's ``roc_curve``.
    """
    from sklearn.metrics import roc_curve

    column = CLASSES.index("mel")
    recalls = []
    for answers in sets:
        melanoma = answers.labels == column
        if not 0 < melanoma.sum() < len(melanoma):
            continue
        score = answers.probabilities[:, column]
        false_positive, true_positive, _ = roc_curve(melanoma, score, drop_intermediate=False)
        # 1 - 0.9 is a little less than 0.1: without the slack the exact point would be missed.
        allowed = false_positive <= 1 - specificity + 1e-12
        recalls.append(float(true_positive[allowed].max()))
    return float(np.mean(recalls)) if recalls else None


def _markdown(
    content: dict[str, Any], measured: Mapping[tuple[str, str], dict[str, Estimate]], split: str
) -> str:
    head = ["model", "classes evened out by", "F1 macro", "balanced accuracy",
            *(f"melanoma recall at {s:.0%} specificity" for s in SPECIFICITIES)]  # fmt: skip
    lines = []
    for row in content["rows"]:
        values = measured.get((row["model"], row["method"]))
        shown = [
            with_interval(values[metric]) if values else "diverged"
            for metric in ("f1_macro", "balanced_accuracy")
        ]
        recalls = [figure(recall) for recall in row["melanoma_recall"].values()]
        title = MODEL_TITLES.get(row["model"], row["model"])
        lines.append([title, row["method"], *shown, *recalls])
    seeds = content["seeds"]
    trainings = "one training" if seeds == 1 else f"the mean of {seeds} trainings"
    return (
        f"Test images of a split by {split}; each figure is {trainings}, in brackets the 95% "
        f"interval of {content['replicates']} bootstrap draws of lesions.\n\n"
        f"{markdown_table(head, lines)}\n"
    )
