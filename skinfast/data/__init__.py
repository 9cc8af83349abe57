"""Images in, batches out: layouts, the decode-once cache, splits, sampling, device batches.

An image's way through this package: a folder in some layout -> ``find_records`` (labels, lesions,
paths) -> ``HAM10000`` (decoded once, uint8 ``[N, H, W, 3]``) -> ``make_split`` (indices only) ->
``DeviceBatches`` (normalised float batches on the device). ``SyntheticLesions`` stands in for
``HAM10000`` where the real images are not at hand.

Names load when they are first used: reading a layout needs no torch, a split no Pillow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skinfast.data.balanced_batches import BalancedBatches
    from skinfast.data.batches import DeviceBatches
    from skinfast.data.classes import CLASS_NAMES, CLASSES, HAM10000_COUNTS
    from skinfast.data.dataset import HAM10000, LesionDataset
    from skinfast.data.layouts import Record, find_records
    from skinfast.data.normalization import channel_statistics
    from skinfast.data.sampling import RESAMPLING_METHODS, class_weights, resample
    from skinfast.data.splits import Split, make_split, split_by_image, split_by_lesion
    from skinfast.data.synthetic import SyntheticLesions

_MODULE_OF = {
    "BalancedBatches": "balanced_batches",
    "CLASSES": "classes",
    "CLASS_NAMES": "classes",
    "DeviceBatches": "batches",
    "HAM10000": "dataset",
    "HAM10000_COUNTS": "classes",
    "LesionDataset": "dataset",
    "RESAMPLING_METHODS": "sampling",
    "Record": "layouts",
    "Split": "splits",
    "SyntheticLesions": "synthetic",
    "channel_statistics": "normalization",
    "class_weights": "sampling",
    "find_records": "layouts",
    "make_split": "splits",
    "resample": "sampling",
    "split_by_image": "splits",
    "split_by_lesion": "splits",
}

__all__ = [
    "CLASSES",
    "CLASS_NAMES",
    "HAM10000",
    "HAM10000_COUNTS",
    "RESAMPLING_METHODS",
    "BalancedBatches",
    "DeviceBatches",
    "LesionDataset",
    "Record",
    "Split",
    "SyntheticLesions",
    "channel_statistics",
    "class_weights",
    "find_records",
    "make_split",
    "resample",
    "split_by_image",
    "split_by_lesion",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
