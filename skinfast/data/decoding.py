"""From files to one uint8 array: open, check, convert to RGB, resize."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from tqdm import tqdm

from skinfast.data import medmnist
from skinfast.data.layouts import Record

MINIMUM_SIDE = 8
MAXIMUM_PIXELS = 50_000_000
#: Named in the cache's key: another filter makes other pixels.
INTERPOLATION = "lanczos"

# Below this many images starting threads costs more than it saves.
_FEW_IMAGES = 64


class BadImageError(Exception):
    """An image that cannot be used; the message is the reason, without the file's name."""


def decode_image(path: Path, image_size: int) -> npt.NDArray[np.uint8]:
    """Decode one JPEG or PNG file and squash it to a square: uint8 ``[image_size, image_size, 3]``.

    Raises:
        BadImageError: unreadable, no JPEG or PNG, truncated, under 8 pixels on a side, or or over
            50 megapixels (told from the header, before anything is decoded).
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            width, height = image.size
            if width * height > MAXIMUM_PIXELS:
                raise BadImageError(f"{width}x{height} pixels, more than 50 megapixels")
            if min(width, height) < MINIMUM_SIDE:
                raise BadImageError(f"{width}x{height} pixels, less than 8 on a side")
            if image.mode.startswith("I"):
                raise BadImageError(f"16-bit grey values (mode {image.mode}); save it as 8-bit RGB")
            return resize(ImageOps.exif_transpose(image).convert("RGB"), image_size)
    except BadImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError("more than 50 megapixels") from error
    except Image.UnidentifiedImageError as error:
        raise BadImageError("not a JPEG or PNG image") from error
    except Exception as error:  # a decoder on damaged bytes raises whatever it stumbles over
        reason = getattr(error, "strerror", None) or error
        raise BadImageError(f"cannot be decoded: {reason}") from error


def resize(image: Image.Image, image_size: int) -> npt.NDArray[np.uint8]:
    """Squash an RGB image to a square with the Lanczos filter: uint8 ``[H, W, 3]``."""
    size = (image_size, image_size)
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS), dtype=np.uint8)


def decode_records(
    records: Sequence[Record],
    image_size: int,
    *,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> tuple[npt.NDArray[np.uint8], list[tuple[str, str]]]:
    """Decode all records; M are good, the others have a reason each.

    Threads, not processes: Pillow lets go of the interpreter lock while it decodes and resizes,
    so two threads are as fast as two processes, and a caller's script needs no
    ``if __name__ == "__main__"``.

    Args:
        records: N records.
        image_size: side of the square in pixels.
        num_workers: threads; None means one for each CPU of this process.
        progress: show a bar; None means only on a terminal.

    Returns:
        images: uint8 ``[M, image_size, image_size, 3]``, the good ones in the records' order.
        bad: (image_id, reason) of the others, in the records' order.

    Raises:
        SkinfastError: a MedMNIST file that cannot be used.
    """
    archives = {record.path for record in records if record.row is not None}
    arrays = {path: medmnist.read_images(path) for path in archives if path is not None}

    def decode(record: Record) -> npt.NDArray[np.uint8] | BadImageError:
        try:
            if record.path is None:
                raise BadImageError("no such file (.jpg, .jpeg or .png)")
            if record.row is not None:
                return resize(Image.fromarray(arrays[record.path][record.row]), image_size)
            return decode_image(record.path, image_size)
        except BadImageError as error:
            return error

    images = np.empty((len(records), image_size, image_size, 3), np.uint8)
    bad: list[tuple[str, str]] = []
    good = 0
    if num_workers is None:
        num_workers = _cpu_count()
    executor = ThreadPoolExecutor(max(num_workers, 1))
    try:
        in_threads = num_workers > 1 and len(records) >= _FEW_IMAGES
        results = executor.map(decode, records) if in_threads else map(decode, records)
        silent = None if progress is None else not progress
        bar = tqdm(results, "decoding images", len(records), unit="image", disable=silent)
        for record, result in zip(records, bar, strict=True):
            if isinstance(result, BadImageError):
                bad.append((record.image_id, str(result)))
            else:
                images[good] = result
                good += 1
    finally:
        executor.shutdown(cancel_futures=True)  # an interrupt must not wait for the whole queue
    return images[:good], bad


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):  # honours taskset and containers; Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
