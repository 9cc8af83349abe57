"""Batches from a dataset that lives on the device: no worker processes, no copies per step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from skinfast.errors import SkinfastError
from skinfast.ops import image_batch

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_LAYOUTS = ("contiguous", "channels_last")


class DeviceBatches:
    """Iterate over normalised, optionally shuffled and mirrored, batches of images.

    The images stay on the device as uint8, a quarter of what floats would take, and for each step
    one op gathers, mirrors and normalises there (``skinfast.ops.image_batch``). Training and test
    batches share one copy when they are given tensors that are on the device already.

    Each iteration yields

    - images: ``dtype`` ``[B, 3, H, W]``, ``(value / 255 - mean) / std``;
    - labels: int64 ``[B]``.

    Order and mirroring follow from (seed, epoch) alone. They are drawn on the CPU, so every
    device sees the same ones, and per image, so the batch size does not change them.

    Args:
        images: uint8 ``[N, H, W, 3]``.
        labels: int64 ``[N]``.
        indices: integer ``[M]``, the images to use; one may be repeated (see ``resample``).
        batch_size: images in a batch; the last batch has what is left.
        device: where images and labels are kept and batches are made.
        mean, std: of R, G and B in units where 255 is 1 (see ``channel_statistics``).
        shuffle: another order every epoch; otherwise the order of ``indices``.
        seed: with the epoch, of the order and the mirroring.
        augment: mirror each image left-right with probability 1/2, top-bottom likewise.
        dtype: of the images yielded: float32, float64, bfloat16 or on a GPU float16.
        layout: how the images yielded are stored: "contiguous" or "channels_last".
        drop_last: leave out a last batch that is not full.

    Raises:
        SkinfastError: an argument that does not fit the description above, or no batch at all.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        indices: npt.ArrayLike,
        batch_size: int,
        *,
        device: torch.device | str,
        mean: Sequence[float],
        std: Sequence[float],
        shuffle: bool,
        seed: int = 0,
        augment: bool = False,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        drop_last: bool = False,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise SkinfastError(
                f"images are {images.dtype} {list(images.shape)}; give uint8 [N, H, W, 3]"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise SkinfastError(
                f"labels are {labels.dtype} {list(labels.shape)}; give int64 [{len(images)}]"
            )
        if batch_size < 1:
            raise SkinfastError(f"batch size is {batch_size}; choose 1 or more")
        if seed < 0:
            raise SkinfastError(f"seed is {seed}; choose 0 or more")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise SkinfastError(
                f"mean is {list(mean)}, std is {list(std)}; give three numbers each, std above 0"
            )
        on_gpu = torch.device(device).type != "cpu"
        if dtype not in _CPU_DTYPES and not (on_gpu and dtype == torch.float16):
            raise SkinfastError(
                f"dtype is {dtype}; choose float32, float64, bfloat16 or, on a GPU, float16"
            )
        if layout not in _LAYOUTS:
            raise SkinfastError(f"layout is {layout!r}; choose one of {', '.join(_LAYOUTS)}")
        self.indices = _checked_indices(indices, len(images))
        if drop_last and len(self.indices) < batch_size:
            raise SkinfastError(
                f"{len(self.indices)} images make no full batch of {batch_size}, and drop_last "
                "leaves out the rest; choose a smaller batch size"
            )
        self.images = images.to(device).contiguous()
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augment = augment
        self.dtype = dtype
        self.layout = layout
        self.drop_last = drop_last
        self.epoch = 0
        # (value / 255 - mean) / std as one multiply-add.
        mean_tensor, std_tensor = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
        self._scale = (1 / (255 * std_tensor)).float().to(device)
        self._shift = (-mean_tensor / std_tensor).float().to(device)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and mirroring the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of batches."""
        batches = len(self.indices) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # One upload of each for the whole epoch; a step then only launches the op.
        device = self.images.device
        order, flips = (drawn.to(device) for drawn in self._draw())
        labels = self.labels.index_select(0, order)
        for batch in range(len(self)):
            rows = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            images = image_batch(
                self.images,
                order[rows],
                self._scale,
                self._shift,
                flips[rows] if self.augment else None,
                self.layout,
                self.dtype,
            )
            yield images, labels[rows]

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This epoch's order, int64 ``[M]``, and flips, uint8 ``[M]``."""
        # SeedSequence mixes the pair: seed + epoch would make run 1's epoch 0 run 0's epoch 1.
        mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        order = self.indices
        if self.shuffle:
            order = order[torch.randperm(len(order), generator=generator)]
        left_right, top_bottom = (torch.rand(len(order), 2, generator=generator) < 0.5).byte().T
        return order, left_right + 2 * top_bottom


def _checked_indices(indices: npt.ArrayLike, num_images: int) -> torch.Tensor:
    array = np.asarray(indices)
    if array.ndim != 1 or not len(array) or not np.issubdtype(array.dtype, np.integer):
        raise SkinfastError(
            f"indices are {array.dtype} {list(array.shape)}; give at least one, integer [M]"
        )
    if array.min() < 0 or array.max() >= num_images:
        raise SkinfastError(
            f"indices reach from {array.min()} to {array.max()}; "
            f"there are images 0 to {num_images - 1}"
        )
    return torch.from_numpy(array.astype(np.int64))
