"""Decode once: the uint8 array of all images, kept in a file that later runs map into memory.

For each data folder and image size there are two files in the cache folder: ``<name>.npy``,
uint8 ``[N, H, W, 3]``, and ``<name>.json``, which says of which files the array was made (a key
over their names, sizes and times), its checksum, and which images were left out and why. A cache
that is stale, truncated or corrupt is never used; it is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from skinfast.data.decoding import INTERPOLATION, decode_records
from skinfast.data.layouts import Record
from skinfast.errors import SkinfastError
from skinfast.files import atomic_path

IMAGE_SIZES = range(8, 1025)

# Raise it when the same files would give another array.
_VERSION = 1
_LISTED = 10


@dataclass(frozen=True)
class CachedImages:
    """The pixels of the good images, in the records' order, and what was left out.

    Attributes:
        images: uint8 ``[N, H, W, 3]``, mapped from the cache file copy-on-write.
        skipped: (image_id, reason) of every image that is not in ``images``.
    """

    images: npt.NDArray[np.uint8]
    skipped: list[tuple[str, str]]


def cache_folder(cache_directory: str | os.PathLike[str] | None = None) -> Path:
    """Where caches are kept.

    The argument, else ``$SKINFAST_CACHE``, ``$XDG_CACHE_HOME/skinfast`` or ``~/.cache/skinfast``.
    """
    if cache_directory is not None:
        return Path(cache_directory).expanduser()
    if os.environ.get("SKINFAST_CACHE"):
        return Path(os.environ["SKINFAST_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "skinfast"
    return Path("~/.cache/skinfast").expanduser()


def load_images(
    records: Sequence[Record],
    root: str | os.PathLike[str],
    image_size: int,
    *,
    skip_bad_images: bool = False,
    num_workers: int | None = None,
    cache_directory: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> CachedImages:
    """Load the images of ``records`` from the cache; decode and store them first if need be.

    While it decodes, all images are held in memory (N * image_size**2 * 3 bytes).

    Args:
        records: what ``find_records(root)`` returned.
        root: the data folder (or file); file names enter the key relative to it, its own place
            and name give the cache file its name.
        image_size: side of the square in pixels, 8 to 1024.
        skip_bad_images: leave out images that are missing or cannot be decoded.
        num_workers, progress: see ``decode_records``.
        cache_directory: see ``cache_folder``.

    Raises:
        SkinfastError: an image size or number of workers out of range; bad images without
            ``skip_bad_images``; no good image at all; a cache folder that cannot be written.
    """
    if image_size not in IMAGE_SIZES:
        raise SkinfastError(f"image size {image_size}: choose 8 to 1024")
    if num_workers is not None and num_workers < 0:
        raise SkinfastError(f"num_workers is {num_workers}: choose 0 (no threads) or more")
    root = Path(root).expanduser()
    place = root.resolve()
    place_hash = hashlib.sha256(os.fsencode(place)).hexdigest()[:12]
    folder = cache_folder(cache_directory)
    path = folder / f"{place.name}-{place_hash}-{image_size}.npy"
    key = _key(records, root, image_size)

    cached = _load(path, key, records, image_size)
    if cached is None:
        _make_folder(folder)
        images, skipped = decode_records(
            records, image_size, num_workers=num_workers, progress=progress
        )
        _refuse_bad(skipped, len(records), skip_bad_images)
        _store(path, key, images, skipped)
        cached = _load(path, key, records, image_size)
        if cached is None:
            raise SkinfastError(
                f"the image cache {path} cannot be read back as it was written; "
                "try again, or set SKINFAST_CACHE to a folder on another disk"
            )
    _refuse_bad(cached.skipped, len(records), skip_bad_images)
    return cached


def _key(records: Sequence[Record], root: Path, image_size: int) -> str:
    digest = hashlib.sha256(f"{_VERSION} {image_size} {INTERPOLATION}".encode())
    stamps: dict[Path, tuple[int, int]] = {}  # of MedMNIST's records all share one file
    for record in records:
        entry: list[object] = [record.image_id, record.lesion_id, record.label, record.row]
        if record.path is not None:
            if record.path not in stamps:
                stamps[record.path] = _stamp(record.path)
            entry += [os.path.relpath(record.path, root), *stamps[record.path]]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return -1, -1  # a broken link: decoding it will say so
    return stat.st_size, stat.st_mtime_ns


def _checksum(images: npt.NDArray[np.uint8], skipped: Sequence[Sequence[str]]) -> str:
    digest = hashlib.sha256(images.reshape(-1).data)
    digest.update(json.dumps(skipped).encode())
    return digest.hexdigest()


def _load(path: Path, key: str, records: Sequence[Record], image_size: int) -> CachedImages | None:
    """The cache at ``path``, or None unless it is whole, of ``key``, and still true."""
    try:
        side = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        # Copy-on-write: torch warns about memory that it may not write to.
        images = np.load(path, mmap_mode="c", allow_pickle=False)
        if side["key"] != key or side["checksum"] != _checksum(images, side["skipped"]):
            return None
        skipped = [(image_id, reason) for image_id, reason in side["skipped"]]
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    shape = (len(records) - len(skipped), image_size, image_size, 3)
    if images.dtype != np.uint8 or images.shape != shape:
        return None
    # A file may have been unreadable for a while only, which no size and no time gives away.
    left_out = {image_id for image_id, _ in skipped}
    again = [record for record in records if record.image_id in left_out]
    _, still_bad = decode_records(again, image_size, num_workers=0, progress=False)
    return CachedImages(images, skipped) if len(still_bad) == len(again) else None


def _make_folder(folder: Path) -> None:
    # Before decoding, so that nobody waits for minutes to be told.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _store(
    path: Path, key: str, images: npt.NDArray[np.uint8], skipped: list[tuple[str, str]]
) -> None:
    side = {"key": key, "checksum": _checksum(images, skipped), "skipped": skipped}
    try:
        # Nested, so that a disk that fills up over either file leaves both old ones in place.
        with atomic_path(path) as pixels_file, atomic_path(path.with_suffix(".json")) as side_file:
            with pixels_file.open("wb") as stream:
                np.save(stream, images, allow_pickle=False)
            side_file.write_text(json.dumps(side), encoding="utf-8")
    except OSError as error:
        raise _cannot_write(path.parent, error) from error


def _cannot_write(folder: Path, error: OSError) -> SkinfastError:
    return SkinfastError(
        f"cannot write the image cache to {folder}: {error.strerror or error}; "
        "set SKINFAST_CACHE to a folder that can be written and has room"
    )


def _refuse_bad(bad: list[tuple[str, str]], total: int, skip_bad_images: bool) -> None:
    if not bad or (skip_bad_images and len(bad) < total):
        return
    listed = ", ".join(f"{image_id} ({reason})" for image_id, reason in bad[:_LISTED])
    if len(bad) > _LISTED:
        listed += f" and {len(bad) - _LISTED} more"
    if len(bad) == total:
        raise SkinfastError(f"none of the {total} images can be used: {listed}; check the folder")
    raise SkinfastError(
        f"{len(bad)} of {total} images cannot be used: {listed}; "
        "mend them, or go on without them with --skip-bad-images"
    )
