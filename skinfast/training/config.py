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
from skinfast.models.cnn import MINIMUM_IMAGE_SIZE

PRECISIONS = ("float32", "bfloat16")
LR_SCHEDULES = ("constant", "cosine", "one-cycle", "step")
LOSSES = ("cross-entropy", "focal")
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
    batch_size: int = _setting(64, "images in a step, over all processes together")
    lr: float = _setting(1e-3, "Adam's learning rate (the paper: 0.01 for ResNet-50)")
    beta1: float = _setting(0.9, "Adam's decay rate of the first moment")
    beta2: float = _setting(0.999, "Adam's decay rate of the second moment (the paper: 0.99)")
    eps: float = _setting(1e-8, "Adam's term against division by zero")
    weight_decay: float = _setting(0.0, "L2 penalty, added to the gradient")
    decoupled_weight_decay: bool = _setting(
        False, "shrink the weights themselves by lr * weight decay instead (AdamW)"
    )
    lr_schedule: str = _setting("constant", "how the learning rate goes", LR_SCHEDULES)
    warmup_epochs: float = _setting(0.0, "epochs over which the learning rate rises at first")
    lr_step_epochs: int = _setting(10, "of the step schedule: epochs between two steps")
    lr_step_factor: float = _setting(0.1, "of the step schedule: factor at each step")
    split: str = _setting("image", "80/20 by image, as in the paper, or by lesion", SPLIT_KINDS)
    folds: int = _setting(5, "of a split by lesion: how many folds; one of them is the test set")
    fold: int = _setting(0, "of a split by lesion: which fold, from 0, is the test set")
    validation_fraction: float = _setting(
        0.0, "share of the training images set aside; the weights of the best epoch there are kept"
    )
    patience: int = _setting(
        0, "stop after so many epochs without better balanced accuracy in validation (0: never)"
    )
    sampling: str = _setting(
        "none", "under- or over-sample the training classes", tuple(RESAMPLING_METHODS)
    )
    balanced_batches: bool = _setting(False, "draw as many images of each class into every batch")
    class_weights: bool = _setting(False, "weight the loss by inverse class frequency")
    loss: str = _setting("cross-entropy", "what is minimised", LOSSES)
    focal_gamma: float = _setting(2.0, "of the focal loss: how much less easy images count")
    label_smoothing: float = _setting(0.0, "share of the target spread over all classes")
    augment: bool = _setting(False, "mirror training images at random")
    rotate: bool = _setting(False, "turn training images by 0, 90, 180 or 270 degrees at random")
    color_jitter: float = _setting(
        0.0, "vary contrast, brightness and tint by up to this many standard deviations"
    )
    ema_decay: float = _setting(0.0, "of a moving average of the weights, which is kept (0: none)")
    test_time_augmentation: bool = _setting(
        False, "evaluate by the mean probability over the 8 mirrored and turned views"
    )
    seed: int = _setting(0, "of the split, the initial weights and the order of images")
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N")
    sync_batch_norm: bool = _setting(
        False, "of several processes: normalise by the whole batch, not by each one's part of it"
    )
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
        for name, good, needed in self._ranges():
            if not good:
                raise SkinfastError(
                    f"{option(name)} is {getattr(self, name)}; it needs to be {needed}"
                )
        self._check_combinations()

    def _ranges(self) -> list[tuple[str, bool, str]]:
        """Name, whether it is in its range, and the range in words, of the settings that have one.

        A NaN or an infinity is not among them.
        """
        return [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("image_size", 8 <= self.image_size <= 1024, "from 8 to 1024"),
            ("lr", self.lr > 0, "above 0"),
            ("beta1", 0 <= self.beta1 < 1, "from 0 to below 1"),
            ("beta2", 0 <= self.beta2 < 1, "from 0 to below 1"),
            ("eps", self.eps > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, "from 0 to below --epochs"),
            ("lr_step_epochs", self.lr_step_epochs >= 1, "at least 1"),
            ("lr_step_factor", 0 < self.lr_step_factor <= 1, "above 0, at most 1"),
            ("folds", self.folds >= 2, "at least 2"),
            ("fold", 0 <= self.fold < self.folds, "from 0 to below --folds"),
            ("validation_fraction", 0 <= self.validation_fraction < 1, "from 0 to below 1"),
            ("patience", self.patience >= 0, "at least 0"),
            ("focal_gamma", self.focal_gamma >= 0, "at least 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1"),
            ("color_jitter", 0 <= self.color_jitter < 1, "from 0 to below 1"),
            ("ema_decay", 0 <= self.ema_decay < 1, "from 0 to below 1"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 2**32 - 1"),
        ]

    def _check_combinations(self) -> None:
        """Refuse settings that contradict each other, or of which one would silently do nothing."""
        part, k = self.validation_fraction, round(1 / (self.validation_fraction or 1))
        for wrong, message in (
            (
                self.batch_size == 1 and self.model != "cnn",
                f"--batch-size is 1, but {self.model} normalises by the batch; choose 2 or more",
            ),
            (
                self.model == "cnn" and self.image_size < MINIMUM_IMAGE_SIZE,
                f"--image-size is {self.image_size}, but the CNN's three pools need at least "
                f"{MINIMUM_IMAGE_SIZE}; choose {MINIMUM_IMAGE_SIZE} or more, or another --model",
            ),
            (
                self.split == "image" and (self.folds, self.fold) != (5, 0),
                "--folds and --fold are of a split by lesion; add --split lesion",
            ),
            (
                self.split == "lesion" and part > 0 and (k < 2 or abs(k * part - 1) > 1e-6),
                f"--validation-fraction is {part}; by lesion it needs to be 1/k, such as 0.1 or "
                "0.2, at most 0.5",
            ),
            (
                self.patience > 0 and part == 0,
                "--patience needs a validation part; add --validation-fraction 0.1",
            ),
            (
                self.balanced_batches and self.sampling != "none",
                f"--balanced-batches and --sampling {self.sampling} both even out the classes; "
                "choose one",
            ),
            (
                self.balanced_batches and self.class_weights,
                "--balanced-batches and --class-weights together correct for the classes twice; "
                "choose one",
            ),
            (
                self.loss == "focal" and self.label_smoothing > 0,
                "--label-smoothing is of the cross-entropy loss; leave it out with --loss focal",
            ),
        ):
            if wrong:
                raise SkinfastError(message)

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
        if changes.get("epochs", self.epochs) != self.epochs and self.lr_schedule in (
            "cosine",
            "one-cycle",
        ):
            raise SkinfastError(
                f"the run's --lr-schedule {self.lr_schedule} was laid out for {self.epochs} "
                "epochs; leave --epochs out, or start a new run with another --output"
            )
        return dataclasses.replace(self, **changes)


def option(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")
