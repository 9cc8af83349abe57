"""Test-set metrics: from labels and probabilities to the figures of ``result.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from skinfast.errors import SkinfastError

if TYPE_CHECKING:
    import torch

# A softmax in half precision misses 1 by up to 2e-3; logits and one-vs-rest scores miss by more.
_ROW_SUM_TOLERANCE = 1e-2

# Clips only what float32 cannot hold: one certain mistake costs ln(1 / tiny) = 87.3 nats.
_SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)


def classification_metrics(
    labels: npt.ArrayLike | torch.Tensor,
    probabilities: npt.ArrayLike | torch.Tensor,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Measure single-label predictions.

    The predicted class is the one of highest probability, at a tie the first. A ratio with nothing
    below the line (the precision of a class that is never predicted) counts as 0.

    Every macro average is the plain mean over the classes that *occur in* ``labels``: a class
    without a test image has no recall and no AUC, and does not dilute the others' mean. (sklearn's
    own default would also average over classes that are only predicted.) Recall averaged so *is*
    balanced accuracy; both keys are there because both names are looked for. ``f1_weighted``
    weights by support, so it follows accuracy and hides the rare classes.

    Args:
        labels: true classes, integers in ``[0, C)``, shape ``[N]``; N at least 1.
        probabilities: shape ``[N, C]``, any float dtype, each row summing to 1.
        class_names: the C names, in the order of the columns.

    Returns:
        A dict that ``json.dumps(..., allow_nan=False)`` accepts:

        ===========================  =========================================================
        ``num_images``, ``classes``  N, and ``class_names`` as a list
        ``loss``                     mean negative log likelihood, in nats
        ``accuracy``                 share of images whose predicted class is the true one
        ``majority_accuracy``        what always answering the commonest true class scores
        ``balanced_accuracy``        mean recall (macro)
        ``f1_weighted``              F1 averaged with weights ``support / N``
        ``f1_macro``                 mean F1 (macro); at most ``2P / (1 + P)`` for P below
        ``precision_macro``          mean precision P (macro)
        ``recall_macro``             equal to ``balanced_accuracy``
        ``auc_macro``                mean one-vs-rest area under the ROC curve over the classes
                                     that have one; None if none has
        ``per_class``                C dicts of ``name``, ``precision``, ``recall``, ``f1``,
                                     ``auc`` (None if undefined), ``support``, ``predicted``
        ``confusion_matrix``         C x C counts, rows are the truth, columns the prediction
        ===========================  =========================================================

    Raises:
        SkinfastError: no images, shapes that disagree, labels that are not integers in range, or
            probabilities that are not finite or do not sum to 1.

    Source: precision, recall, F1, confusion matrix and AUC are scikit-learn's.
    """
    # sklearn takes a second to import, which `skinfast --help` should not wait for.
    from sklearn.metrics import (
        confusion_matrix,
        precision_recall_fscore_support,
        roc_auc_score,
    )

    y, p = _checked(_to_numpy(labels), _to_numpy(probabilities), class_names)
    num_images, num_classes = p.shape
    every_class = np.arange(num_classes)
    guess = p.argmax(axis=1)

    precision, recall, f1, support = precision_recall_fscore_support(
        y, guess, labels=every_class, average=None, zero_division=0
    )
    confusion = confusion_matrix(y, guess, labels=every_class)
    # AUC needs a positive and a negative; sklearn would warn and give NaN, which JSON has not.
    auc = [
        float(roc_auc_score(y == c, p[:, c])) if 0 < support[c] < num_images else None
        for c in every_class
    ]
    defined_auc = [area for area in auc if area is not None]
    present = support > 0
    likelihood = p[np.arange(num_images), y].clip(_SMALLEST_PROBABILITY, 1.0)

    return {
        "num_images": num_images,
        "classes": list(class_names),
        "loss": float(-np.log(likelihood).mean()),
        "accuracy": float((guess == y).mean()),
        "majority_accuracy": float(support.max() / num_images),
        "balanced_accuracy": float(recall[present].mean()),
        "f1_weighted": float(np.average(f1, weights=support)),
        "f1_macro": float(f1[present].mean()),
        "precision_macro": float(precision[present].mean()),
        "recall_macro": float(recall[present].mean()),
        "auc_macro": float(np.mean(defined_auc)) if defined_auc else None,
        "per_class": [
            {
                "name": name,
                "precision": float(precision[c]),
                "recall": float(recall[c]),
                "f1": float(f1[c]),
                "auc": auc[c],
                "support": int(support[c]),
                "predicted": int(confusion[:, c].sum()),
            }
            for c, name in enumerate(class_names)
        ],
        "confusion_matrix": confusion.tolist(),
    }


def _to_numpy(values: npt.ArrayLike | torch.Tensor) -> npt.NDArray[Any]:
    import torch

    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16.
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _checked(
    y: npt.NDArray[Any], p: npt.NDArray[Any], class_names: Sequence[str]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return labels ``[N]`` and probabilities ``[N, C]``, or raise on the first thing wrong."""
    if p.ndim != 2 or p.shape[1] != len(class_names):
        raise SkinfastError(
            f"probabilities have shape {list(p.shape)}: "
            f"give [N, {len(class_names)}], one column for each class name"
        )
    if y.shape != p.shape[:1]:
        raise SkinfastError(
            f"labels have shape {list(y.shape)}: "
            f"give [{p.shape[0]}], one for each row of the probabilities"
        )
    if p.size == 0:
        raise SkinfastError("there are no predictions to measure: give at least one image")
    if y.dtype.kind not in "iu":
        raise SkinfastError(f"labels are {y.dtype}: give class indices as integers")
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise SkinfastError(
            f"labels run from {y.min()} to {y.max()}: "
            f"with {p.shape[1]} classes they must lie in 0 to {p.shape[1] - 1}"
        )
    if p.dtype.kind != "f":
        raise SkinfastError(f"probabilities are {p.dtype}: give floating-point numbers")

    p = p.astype(np.float64)
    broken = ~np.isfinite(p).all(axis=1)
    if broken.any():
        raise SkinfastError(
            f"{broken.sum()} of {len(p)} rows of probabilities hold NaN or infinity, first row "
            f"{broken.argmax()}: the model diverged; train again with a lower learning rate"
        )
    off = (p < 0).any(axis=1) | (abs(p.sum(axis=1) - 1) > _ROW_SUM_TOLERANCE)
    if off.any():
        raise SkinfastError(
            f"row {off.argmax()} of the probabilities is negative somewhere or does not sum to 1: "
            "give softmax outputs, not logits"
        )
    return y.astype(np.int64), p
