"""What a configuration means: which images train and test, on which device, normalised how."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from skinfast.data import (
    HAM10000,
    DeviceBatches,
    LesionDataset,
    Split,
    SyntheticLesions,
    channel_statistics,
    make_split,
    resample,
    split_by_image,
    split_by_lesion,
)
from skinfast.data.balanced_batches import BalancedBatches
from skinfast.errors import SkinfastError
from skinfast.models import CHANNELS_LAST_MODELS
from skinfast.models.logistic_regression import LogisticRegression
from skinfast.training.config import TrainConfig


@dataclass(frozen=True)
class Problem:
    """A dataset split and ready to be served from a device.

    Attributes:
        split: indices of the training and test images.
        train_indices: the training images, less those of the validation part, after re-sampling.
        validation_indices: the images of the validation part, in order; often none.
        mean, std: of R, G and B over the images that train, in units where 255 is 1.
    """

    config: TrainConfig
    device: torch.device
    dataset: LesionDataset
    split: Split
    train_indices: npt.NDArray[np.int64]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    validation_indices: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(0, dtype=np.int64)
    )

    def train_batches(self, model: nn.Module | None = None) -> DeviceBatches:
        """The training images, shuffled every epoch.

        A last batch of a single image has no batch statistics to normalise by; it is left out,
        and falls on another image every epoch.

        Args:
            model: what they train. One that can read bytes gets them, and is told what they stand
                for; no other does, and None stands for no model in particular.
        """
        lonely = len(self.train_indices) % self.config.batch_size == 1 < self.config.batch_size
        reader = self._reader_of_bytes(model)
        batches = self._batches(
            self.train_indices,
            shuffle=True,
            augmented=True,
            drop_last=lonely,
            dtype=self._train_dtype() if reader is None else torch.uint8,
            kind=BalancedBatches if self.config.balanced_batches else DeviceBatches,
        )
        if reader is not None:
            reader.take_bytes(batches.scale, batches.shift)
        return batches

    def validation_batches(self) -> DeviceBatches:
        """The images of the validation part, in the order of ``validation_indices``."""
        return self._batches(self.validation_indices, shuffle=False)

    def test_batches(self) -> DeviceBatches:
        """The test images, in the order of ``split.test``."""
        return self._batches(self.split.test, shuffle=False)

    def _batches(
        self,
        indices: npt.NDArray[np.int64],
        *,
        shuffle: bool,
        augmented: bool = False,
        drop_last: bool = False,
        dtype: torch.dtype = torch.float32,
        kind: type[DeviceBatches] = DeviceBatches,
    ) -> DeviceBatches:
        return kind(
            *self._resident,
            indices,
            self.config.batch_size,
            device=self.device,
            mean=self.mean,
            std=self.std,
            shuffle=shuffle,
            seed=self.config.seed,
            augment=augmented and self.config.augment,
            rotate=augmented and self.config.rotate,
            color_jitter=self.config.color_jitter if augmented else 0.0,
            drop_last=drop_last,
            dtype=dtype,
            layout=self._layout(),
        )

    @cached_property
    def _resident(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels on the device: one copy for training and test."""
        return self.dataset.images.to(self.device), self.dataset.labels.to(self.device)

    def _layout(self) -> str:
        """How the images must be stored for the model to take them as they are."""
        return "channels_last" if self.config.model in CHANNELS_LAST_MODELS else "contiguous"

    def _train_dtype(self) -> torch.dtype:
        """Of the images: where autocast would round them first thing, they come rounded."""
        lowered = self.config.precision == "bfloat16" and self.config.model != "logistic-regression"
        return torch.bfloat16 if lowered else torch.float32

    def _reader_of_bytes(self, model: nn.Module | None) -> LogisticRegression | None:
        """The model where it reads bytes and the images are such: not with their colours varied."""
        if not isinstance(model, LogisticRegression) or self.config.color_jitter:
            return None
        return model if model.can_take_bytes else None

    def fingerprint(self) -> str:
        """A hash of names, labels and mean colours: equal for equal data."""
        text = "\n".join([*self.dataset.image_ids, repr((self.mean, self.std))]).encode()
        return hashlib.sha256(text + self.dataset.labels.numpy().tobytes()).hexdigest()


def prepare(config: TrainConfig) -> Problem:
    """Load and split the data of a configuration.

    Raises:
        SkinfastError: the device, the data or the split cannot be used.
    """
    device = choose_device(config.device)
    dataset: LesionDataset
    if config.data == "synthetic":
        dataset = SyntheticLesions(image_size=config.image_size)
    else:
        dataset = HAM10000(config.data, config.image_size, skip_bad_images=config.skip_bad_images)
    split = make_split(dataset, config.split, config.seed, num_folds=config.folds, fold=config.fold)
    train, validation = _set_aside(config, dataset, split.train)
    mean, std = channel_statistics(dataset.images, train)
    train = resample(train, dataset.labels, config.sampling, config.seed)
    return Problem(config, device, dataset, split, train, mean, std, validation)


def _set_aside(
    config: TrainConfig, dataset: LesionDataset, train: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Part the training images as the test images were parted: what trains, what validates."""
    if not config.validation_fraction:
        return train, train[:0]
    labels = dataset.labels.numpy()[train]
    if config.split == "lesion":
        groups = dataset.groups()[train]
        parts = split_by_lesion(labels, groups, config.validation_fraction, config.seed)
    else:
        parts = split_by_image(labels, config.validation_fraction, config.seed)
    return train[parts.train], train[parts.test]


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU that the kernels were built for, or the CPU.

    Raises:
        SkinfastError: no such device, or it can't be used here.
    """
    from skinfast.testing import has_cuda_kernels

    usable = torch.cuda.is_available() and has_cuda_kernels()
    if name == "auto":
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SkinfastError(f"--device is {name!r}; choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise SkinfastError(f"--device is {name!r}; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not usable:
        reason = (
            "this build has no CUDA kernels (see `skinfast info`)"
            if torch.cuda.is_available()
            else "torch finds no GPU"
        )
        raise SkinfastError(f"--device is {name}, but {reason}; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SkinfastError(
            f"--device is {name}, but there are {torch.cuda.device_count()} GPUs, from cuda:0"
        )
    return device
