"""What an epoch reports, summed on the device."""

from __future__ import annotations

import torch
from torch import Tensor

import skinfast.ops._library  # noqa: F401  (loads the compiled ops)


def classification_totals_(
    totals: Tensor, mean_loss: Tensor, logits: Tensor, labels: Tensor
) -> None:
    """Add a batch to the sums of an epoch: ``mean_loss * B``, the correct answers and ``B``.

    An answer is the place of the row's largest logit as ``torch.argmax`` finds it: NaN counts as
    larger than everything, the first of equals wins. Nothing waits for the device.

    Args:
        totals: float64 ``[3]``, contiguous.
        mean_loss: ``[]``, float32, float64, bfloat16 or (CUDA) float16.
        logits: ``[B, C]``, likewise.
        labels: int64 ``[B]``.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    torch.ops.skinfast.classification_totals_(totals, mean_loss, logits, labels)


@torch.library.register_fake("skinfast::classification_totals_")
def _(totals: Tensor, mean_loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    return None
