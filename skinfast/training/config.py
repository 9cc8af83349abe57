"""Every setting of a run: the command's options, the Python argument and config.json in one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skinfast.data.sampling import RESAMPLING_METHODS
from skinfast.data.splits import SPLIT_KINDS
from skinfast.errors import SkinfastError
from skinfast.files import atomic_write_text

PRECISIONS = ("float32", "bfloat16")
#: May change between a run and its continuation; everything else defines the run.
RESUMABLE_CHANGES = ("epochs", "device")


_KINDS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


def _setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run; the defaults are torch's where torch has any.

    Raises:
        SkinfastError: a value out of range; the line names the setting.
    """

    model: str = _setting(
        "cnn", "which classifier to train", ("resnet50", "cnn", "logistic-regression")
    )
    data: str = _setting("synthetic", "folder (or MedMNIST .npz) of HAM10000, or 'synthetic'")
    image_size: int = _setting(64, "side of the square images, in pixels")
    epochs: int = _setting(30, "passes over the training set")
    batch_size: int = _setting(64, "images in a step")
    lr: float = _setting(1e-3, "Adam's learning rate (the paper: 0.01 for ResNet-50)")
    beta1: float = _setting(0.9, "Adam's decay rate of the first moment")
    beta2: float = _setting(0.999, "Adam's decay rate of the second moment (the paper: 0.99)")
    eps: float = _setting(1e-8, "Adam's term against division by zero")
    weight_decay: float = _setting(0.0, "L2 penalty, added to the gradient")
    split: str = _setting("image", "80/20 by image, as in the paper, or by lesion", SPLIT_KINDS)
    sampling: str = _setting(
        "none", "under- or over-sample the training classes", tuple(RESAMPLING_METHODS)
    )
    class_weights: bool = _setting(False, "weight the loss by inverse class frequency")
    label_smoothing: float = _setting(0.0, "share of the target spread over all classes")
    augment: bool = _setting(False, "mirror training images at random")
    seed: int = _setting(0, "of the split, the initial weights and the order of images")
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N")
    precision: str = _setting("float32", "arithmetic of the forward and backward pass", PRECISIONS)
    backend: str = _setting("skinfast", "the fused ops, or pure PyTorch", ("skinfast", "torch"))
    skip_bad_images: bool = _setting(False, "go on without images that cannot be read")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value: Any = getattr(self, setting.name)
            choices = setting.metadata["choices"]
            kind: type = _KINDS[str(setting.type)]
            if kind is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, setting.name, value)
            if type(value) is not kind or value in (math.inf, -math.inf) or value != value:
                needed = "a finite float" if kind is float else kind.__name__
                raise SkinfastError(f"{option(setting.name)} is {value!r}; it needs to be {needed}")
            if choices and value not in choices:
                raise SkinfastError(
                    f"{option(setting.name)} is {value!r}; choose one of {', '.join(choices)}"
                )
        self._check("epochs", self.epochs >= 1, "at least 1")
        self._check("batch_size", self.batch_size >= 1, "at least 1")
        if self.batch_size == 1 and self.model != "cnn":
            raise SkinfastError(
                f"--batch-size is 1, but {self.model} normalises by the batch; choose 2 or more"
            )
        self._check("image_size", 8 <= self.image_size <= 1024, "from 8 to 1024")
        self._check("lr", self.lr > 0, "above 0")
        self._check("beta1", 0 <= self.beta1 < 1, "from 0 to below 1")
        self._check("beta2", 0 <= self.beta2 < 1, "from 0 to below 1")
        self._check("eps", self.eps > 0, "above 0")
        self._check("weight_decay", self.weight_decay >= 0, "at least 0")
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1")
        self._check("seed", 0 <= self.seed < 2**32, "from 0 to 2**32 - 1")

    def _check(self, name: str, good: bool, needed: str) -> None:
        if not good:
            raise SkinfastError(f"{option(name)} is {getattr(self, name)}; it needs to be {needed}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the settings as JSON, whole or not at all."""
        atomic_write_text(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """Read what ``save`` wrote.

        Raises:
            SkinfastError: the file is missing, not JSON, or has settings of another version.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SkinfastError(
                f"{path} is missing; give the --output folder of a `skinfast train`"
            ) from None
        except (OSError, ValueError) as error:
            raise SkinfastError(f"{path} cannot be read ({error}); train again") from error
        known = {setting.name for setting in dataclasses.fields(cls)}
        if not isinstance(values, dict) or not values.keys() <= known:
            unknown = ", ".join(sorted(values.keys() - known)) if isinstance(values, dict) else "?"
            raise SkinfastError(f"{path} has unknown settings ({unknown}); train again")
        try:
            return cls(**values)
        except SkinfastError as error:
            raise SkinfastError(f"{path}: {error}") from error

    def continued_by(self, changes: dict[str, Any]) -> TrainConfig:
        """These settings with ``changes``, for a run that goes on.

        Raises:
            SkinfastError: a change would make it another run.
        """
        for name, value in changes.items():
            if name not in RESUMABLE_CHANGES and value != getattr(self, name):
                raise SkinfastError(
                    f"the run was started with {option(name)} {getattr(self, name)}, not {value}; "
                    "leave that option out, or start a new run with another --output"
                )
        return dataclasses.replace(self, **changes)


def option(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")
