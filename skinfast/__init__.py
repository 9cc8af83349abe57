"""skinfast: fused PyTorch kernels that train skin-lesion classifiers, fast.

Importing the package is light: submodules load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skinfast import (
        data,
        evaluation,
        experiments,
        models,
        nn,
        ops,
        optim,
        report,
        testing,
        training,
    )
    from skinfast._selfcheck import selfcheck

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "data",
    "evaluation",
    "experiments",
    "models",
    "nn",
    "ops",
    "optim",
    "report",
    "selfcheck",
    "testing",
    "training",
]


def __getattr__(name: str) -> Any:
    if name == "selfcheck":
        return importlib.import_module("skinfast._selfcheck").selfcheck
    if name in __all__:
        return importlib.import_module(f"skinfast.{name}")
    raise AttributeError(f"module 'skinfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
