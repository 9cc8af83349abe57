"""How well a class can be told without looking at the image."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from skinfast.data.layouts import metadata_tables

_KEYS = ("lesion_id", "image_id", "dx")
_FOLDS = 5
#: Written down with the diagnosis or after it, so it can't be had for a new patient.
AFTER_DIAGNOSIS = ("dx_type",)


def read_columns(
    root: str | os.PathLike[str], image_ids: Sequence[str]
) -> dict[str, npt.NDArray[np.str_]]:
    """What ``HAM10000_metadata`` under ``root`` says of each image beside lesion and diagnosis.

    Returns:
        For each further column its values ``[N]`` in the order of ``image_ids``, "" for a value
        that is missing. Empty where there is no such table. The table itself was checked when the
        data were loaded.
    """
    tables = metadata_tables(root)
    if not tables:
        return {}
    lines = tables[0].read_text(encoding="utf-8-sig").splitlines()
    rows = list(csv.DictReader(lines, delimiter="\t" if "\t" in lines[0] else ","))
    of_image = {(row["image_id"] or "").strip(): row for row in rows}
    names = [name for name in rows[0] if name and name not in _KEYS]
    return {
        name: np.array([(of_image[i][name] or "").strip() for i in image_ids]) for name in names
    }


def metadata_leaks(
    columns: dict[str, npt.NDArray[np.str_]],
    labels: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Balanced accuracy of classifiers that see columns of the metadata and no image.

    A logistic regression on one-hot values, classes weighted evenly, cross-validated over lesions;
    for each column alone, for all that are known before the diagnosis, and for all.

    Args:
        columns: of ``read_columns``.
        labels: integer ``[N]``.
        groups: the lesion of each image, integer ``[N]``.
        seed: of the folds.

    Returns:
        For each set of columns ``columns``, ``balanced_accuracy`` (mean over the folds),
        ``standard_deviation`` (over the folds), ``chance`` (1 / number of classes),
        ``above_chance`` (by more than two standard deviations) and ``after_diagnosis``. Empty
        where the images are too few to be cross-validated.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    present, counts = np.unique(labels, return_counts=True)
    telling = [name for name, values in columns.items() if len(set(values.tolist())) > 1]
    lesions_of_rarest = min(len(np.unique(groups[labels == c])) for c in present)
    if not telling or len(present) < 2 or min(lesions_of_rarest, counts.min()) < _FOLDS:
        return []
    before = [name for name in telling if name not in AFTER_DIAGNOSIS]
    sets = [[name] for name in telling]
    sets += [together for together in (before, telling) if len(together) > 1]
    folds = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed)
    leaks = []
    for number, names in enumerate(sets):
        if names in sets[:number]:
            continue
        model = make_pipeline(
            # Values as rare as that are one value, and names of persons or devices no leak.
            OneHotEncoder(min_frequency=10, handle_unknown="infrequent_if_exist"),
            LogisticRegression(class_weight="balanced", max_iter=500),
        )
        values = np.stack([columns[name] for name in names], axis=1)
        with warnings.catch_warnings():
            # A fold may lack the rarest class; scikit-learn then averages over the others.
            warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
            scores = cross_val_score(
                model, values, labels, groups=groups, cv=folds, scoring="balanced_accuracy"
            )
        mean, deviation, chance = float(scores.mean()), float(scores.std()), 1 / len(present)
        leaks.append(
            {
                "columns": names,
                "balanced_accuracy": mean,
                "standard_deviation": deviation,
                "chance": chance,
                "above_chance": mean - 2 * deviation > chance,
                "after_diagnosis": any(name in AFTER_DIAGNOSIS for name in names),
            }
        )
    return leaks
