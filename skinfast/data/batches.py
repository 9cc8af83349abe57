"""Batches from a dataset that lives on the device: no worker processes, no copies per step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from skinfast.errors import SkinfastError
from skinfast.ops.image_batch import image_batch, mean_bytes

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.uint8)
_LAYOUTS = ("contiguous", "channels_last")


class DeviceBatches:
    """Iterate over normalised, optionally shuffled and augmented, batches of images.

    The images stay on the device as uint8, a quarter of what floats would take, and for each step
    one op gathers, augments and normalises there (``skinfast.ops.image_batch``). Training and test
    batches share one copy when they are given tensors that are on the device already.

    Each iteration yields

    - images: ``dtype`` ``[B, 3, H, W]``, ``(value / 255 - mean) / std``; in uint8 ``value``, whose
      normalisation is then ``scale * value + shift``;
    - labels: int64 ``[B]``.

    The order follows from (seed, epoch) alone; it is drawn on the CPU, so every device sees the
    same. How an image is augmented follows from (seed, epoch, its index) alone, and where it comes
    several times in an epoch from that number too. So neither depends on the batch size.

    Args:
        images: uint8 ``[N, H, W, 3]``.
        labels: int64 ``[N]``.
        indices: integer ``[M]``, the images to use; one may be repeated (see ``resample``).
        batch_size: images in a batch; the last batch has what is left.
        device: where images and labels are kept and batches are made.
        mean, std: of R, G and B in units where 255 is 1 (see ``channel_statistics``).
        shuffle: another order every epoch; otherwise the order of ``indices``.
        seed: with the epoch, of the order and the augmentation.
        augment: mirror each image left-right with probability 1/2, top-bottom likewise.
        rotate: turn each image by 0, 90, 180 or 270 degrees, each with probability 1/4. A lesion
            has no upright position, so mirrored and turned it is as likely a photograph as it was,
            and pixels only change their places.
        color_jitter: vary contrast, brightness and tint by up to this many standard deviations of
            the colours (see ``image_batch``).
        dtype: of the images yielded: float32, float64, bfloat16, on a GPU float16, or uint8 where
            their colours are not varied.
        layout: how the images yielded are stored: "contiguous" or "channels_last".
        drop_last: leave out a last batch that is not full.

    Attributes:
        scale, shift: float32 ``[3]`` on the device, of the normalisation as one multiply-add.

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
        rotate: bool = False,
        color_jitter: float = 0.0,
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
        if rotate and images.shape[1] != images.shape[2]:
            raise SkinfastError(
                f"images are {images.shape[1]}x{images.shape[2]}; to be turned they must be square"
            )
        if not 0 <= color_jitter < 1:
            raise SkinfastError(f"color jitter is {color_jitter}; choose 0 or more, below 1")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise SkinfastError(
                f"mean is {list(mean)}, std is {list(std)}; give three numbers each, std above 0"
            )
        on_gpu = torch.device(device).type != "cpu"
        if dtype not in _CPU_DTYPES and not (on_gpu and dtype == torch.float16):
            raise SkinfastError(
                f"dtype is {dtype}; choose float32, float64, bfloat16 or, on a GPU, float16, or "
                "uint8"
            )
        if dtype == torch.uint8 and color_jitter:
            raise SkinfastError(
                f"color jitter is {color_jitter}, which bytes don't take; choose 0 or another dtype"
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
        self.rotate = rotate
        self.color_jitter = color_jitter
        self.dtype = dtype
        self.layout = layout
        self.drop_last = drop_last
        self.epoch = 0
        # (value / 255 - mean) / std as one multiply-add.
        mean_tensor, std_tensor = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
        self.scale = (1 / (255 * std_tensor)).float().to(device)
        self.shift = (-mean_tensor / std_tensor).float().to(device)
        self._means = mean_bytes(self.images) if color_jitter else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of batches."""
        batches = len(self.indices) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # One upload of each for the whole epoch; a step then only launches the op.
        device = self.images.device
        order, draws = (drawn.to(device) for drawn in self.draw())
        sizes = self.batch_sizes()
        firsts = [batch * self.batch_size for batch in range(len(sizes))]
        clocks = torch.tensor([(self.epoch, first) for first in firsts]).to(device)
        for clock, size in zip(clocks, sizes, strict=True):
            yield self.fetch(order, draws, clock, size)

    def batch_sizes(self) -> list[int]:
        """How many images each batch of an epoch has."""
        left = len(self.indices) - (len(self) - 1) * self.batch_size
        return [self.batch_size] * (len(self) - 1) + [min(left, self.batch_size)]

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This epoch's order, int64 ``[M]``, and the draw that augments each image, int64 ``[M]``.

        An image's first draw in an epoch is its index.
        """
        order = self._draw_order()
        return order, _draws(order, len(self.images))

    def fetch(
        self, order: torch.Tensor, draws: torch.Tensor, clock: torch.Tensor, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: the images and labels that come in ``order`` from place ``clock[1]`` on.

        Args:
            order, draws: as ``draw`` gives them, on the device.
            clock: int64 ``[2]`` on the device: the epoch, and the place of the first image.
        """
        return image_batch(
            self.images,
            self.labels,
            order,
            self.scale,
            self.shift,
            clock=clock,
            batch_size=batch_size,
            draws=draws,
            seed=self.seed,
            mirror=self.augment,
            rotate=self.rotate,
            color_jitter=self.color_jitter,
            means=self._means,
            layout=self.layout,
            dtype=self.dtype,
        )

    def _draw_order(self) -> torch.Tensor:
        """This epoch's order, int64 ``[M]``."""
        if not self.shuffle:
            return self.indices
        # SeedSequence mixes the pair: seed + epoch would make run 1's epoch 0 run 0's epoch 1.
        mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        return self.indices[torch.randperm(len(self.indices), generator=generator)]


def _draws(order: torch.Tensor, num_images: int) -> torch.Tensor:
    """``index + k * num_images`` for the k-th time, from 0, that ``order`` has an index."""
    ascending, places = order.sort(stable=True)
    first = torch.searchsorted(ascending, ascending)
    times = torch.arange(len(order)) - first
    return torch.empty_like(order).scatter_(0, places, ascending + times * num_images)


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
