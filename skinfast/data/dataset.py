"""Labelled lesion images, all in memory as uint8."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from skinfast.data.cache import load_images
from skinfast.data.classes import CLASSES
from skinfast.data.layouts import find_records
from skinfast.errors import SkinfastError


class LesionDataset(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """N square images with labels and, where known, the lesion that each one shows.

    Attributes:
        images: uint8 ``[N, H, W, 3]``, RGB.
        labels: int64 ``[N]``, indices into ``CLASSES``.
        image_ids: N unique names.
        lesion_ids: N names, equal for photographs of one lesion; None where not known.
        image_size: H = W, in pixels.
        source: where the images came from, for people to read.
        skipped: (image_id, reason) of images that were left out.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        image_ids: Sequence[str],
        lesion_ids: Sequence[str] | None,
        source: str,
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise SkinfastError(
                f"images are {images.dtype} {list(images.shape)}; give uint8 [N, H, W, 3]"
            )
        if images.shape[1] != images.shape[2]:
            raise SkinfastError(f"images are {list(images.shape[1:3])} pixels; make them square")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise SkinfastError(
                f"labels are {labels.dtype} {list(labels.shape)}; give int64 [{len(images)}]"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(CLASSES):
            raise SkinfastError(f"labels must be from 0 to {len(CLASSES) - 1}")
        for name, ids in (("image_ids", image_ids), ("lesion_ids", lesion_ids)):
            if ids is not None and len(ids) != len(images):
                raise SkinfastError(f"{len(ids)} {name} for {len(images)} images; give one each")
        self.images = images
        self.labels = labels
        self.image_ids = list(image_ids)
        self.lesion_ids = None if lesion_ids is None else list(lesion_ids)
        self.image_size = images.shape[1]
        self.source = source
        self.skipped = list(skipped)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """The image, uint8 ``[H, W, 3]``, and its label."""
        return self.images[index], int(self.labels[index])

    def groups(self) -> npt.NDArray[np.int64]:
        """The number of the lesion that each image shows, int64 ``[N]``, from 0 without gaps.

        Raises:
            SkinfastError: the layout does not say which images show the same lesion.
        """
        if self.lesion_ids is None:
            raise SkinfastError(
                f"{self.source} does not say which images show the same lesion; split by image, "
                "or use a layout with lesion ids (HAM10000_metadata.csv)"
            )
        _, numbers = np.unique(self.lesion_ids, return_inverse=True)
        return numbers.astype(np.int64)

    def class_counts(self) -> dict[str, int]:
        """Images of each class, in the order of ``CLASSES``, 0 included."""
        counts = torch.bincount(self.labels, minlength=len(CLASSES)).tolist()
        return dict(zip(CLASSES, counts, strict=True))


class HAM10000(LesionDataset):
    """HAM10000 from a folder in any of its layouts (see ``skinfast.data.layouts``).

    The first time, every image is decoded, squashed to a square with the Lanczos filter and kept
    in the cache; after that loading is a matter of mapping one file.

    Args:
        root: the data folder, or a MedMNIST ``.npz`` file.
        image_size: side in pixels, 8 to 1024.
        skip_bad_images: leave out images that are missing or cannot be decoded, and list them in
            ``skipped``, instead of refusing the folder.
        num_workers: threads that decode; None means one for each CPU, 0 none.
        cache_directory: None means ``$SKINFAST_CACHE``, else ``$XDG_CACHE_HOME/skinfast``, else
            ``~/.cache/skinfast``.
        progress: show a progress bar; None means only on a terminal.

    Raises:
        SkinfastError: a folder, a label file or images that cannot be used; a cache folder that
            cannot be written.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int = 64,
        *,
        skip_bad_images: bool = False,
        num_workers: int | None = None,
        cache_directory: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> None:
        records = find_records(root, image_size)
        cached = load_images(
            records,
            root,
            image_size,
            skip_bad_images=skip_bad_images,
            num_workers=num_workers,
            cache_directory=cache_directory,
            progress=progress,
        )
        left_out = {image_id for image_id, _ in cached.skipped}
        records = [record for record in records if record.image_id not in left_out]
        lesion_ids = [record.lesion_id for record in records if record.lesion_id is not None]
        super().__init__(
            torch.from_numpy(cached.images),
            torch.tensor([record.label for record in records], dtype=torch.int64),
            image_ids=[record.image_id for record in records],
            lesion_ids=lesion_ids if len(lesion_ids) == len(records) else None,
            source=os.fspath(root),
            skipped=cached.skipped,
        )
