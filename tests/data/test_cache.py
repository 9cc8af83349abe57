from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from skinfast.data import HAM10000, find_records
from skinfast.data import cache as cache_module
from skinfast.data.cache import cache_folder, load_images
from skinfast.data.decoding import BadImageError, decode_image, decode_records
from skinfast.errors import SkinfastError

from .folders import ROWS, write_image, write_medmnist, write_metadata


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each call of the decoder was given."""
    calls: list[int] = []

    def counting(records: Any, image_size: int, **options: Any) -> Any:
        if records:
            calls.append(len(records))
        return decode_records(records, image_size, **options)

    monkeypatch.setattr(cache_module, "decode_records", counting)
    return calls


def load(root: Path, image_size: int = 16, **options: Any) -> cache_module.CachedImages:
    return load_images(find_records(root), root, image_size, **options)


def reference(path: Path, image_size: int = 16) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.LANCZOS))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large and ends there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + body + data


def test_pixels_are_what_pillow_makes_of_each_file(one_folder: Path) -> None:
    cached = load(one_folder)
    expected = [reference(one_folder / "images" / f"{image}.jpg") for image, _, _ in ROWS]
    np.testing.assert_array_equal(cached.images, np.stack(expected))
    assert cached.skipped == []


def test_second_load_decodes_nothing(one_folder: Path, decoded: list[int]) -> None:
    first, second = load(one_folder), load(one_folder)
    assert decoded == [len(ROWS)]
    assert isinstance(second.images, np.memmap)
    np.testing.assert_array_equal(first.images, second.images)


def test_threads_change_nothing(tmp_path: Path) -> None:
    rows = [(f"ISIC_{i:07d}", f"HAM_{i}", "nv") for i in range(100)]
    write_metadata(tmp_path / "HAM10000_metadata.csv", rows)
    for image, _, _ in rows[:-1]:
        write_image(tmp_path / f"{image}.png")
    records = find_records(tmp_path)
    alone, bad_alone = decode_records(records, 12, num_workers=0)
    threads, bad_threads = decode_records(records, 12, num_workers=4)
    np.testing.assert_array_equal(alone, threads)
    assert bad_alone == bad_threads == [(rows[-1][0], "no such file (.jpg, .jpeg or .png)")]


def test_each_image_size_has_its_own_cache(
    one_folder: Path, cache: Path, decoded: list[int]
) -> None:
    for image_size in (16, 24, 16, 24):
        assert load(one_folder, image_size).images.shape[1:] == (image_size, image_size, 3)
    assert decoded == [len(ROWS)] * 2
    assert len(names(cache)) == 4


def change_pixels(root: Path) -> None:
    write_image(root / "images" / "ISIC_0000001.jpg", (21, 15))


def change_time_only(root: Path) -> None:
    os.utime(root / "images" / "ISIC_0000001.jpg", ns=(1, 1))


def change_label(root: Path) -> None:
    write_metadata(root / "HAM10000_metadata.csv", [(*ROWS[0][:2], "nv"), *ROWS[1:]])


def change_lesion(root: Path) -> None:
    write_metadata(root / "HAM10000_metadata.csv", [(ROWS[0][0], "HAM_x", ROWS[0][2]), *ROWS[1:]])


def remove_row(root: Path) -> None:
    write_metadata(root / "HAM10000_metadata.csv", ROWS[1:])


def move_image(root: Path) -> None:
    (root / "images" / "ISIC_0000001.jpg").rename(root / "ISIC_0000001.jpg")


@pytest.mark.parametrize(
    "change",
    [change_pixels, change_time_only, change_label, change_lesion, remove_row, move_image],
)
def test_stale_cache_is_rebuilt_in_place(
    one_folder: Path, cache: Path, decoded: list[int], change: Any
) -> None:
    load(one_folder)
    before = names(cache)
    change(one_folder)
    cached = load(one_folder)
    assert len(decoded) == 2
    assert names(cache) == before
    paths = [record.path for record in find_records(one_folder)]
    np.testing.assert_array_equal(cached.images, np.stack([reference(p) for p in paths if p]))


def flip_a_pixel(pixels: Path) -> None:
    data = bytearray(pixels.read_bytes())
    data[-5] ^= 1
    pixels.write_bytes(data)


def truncate(pixels: Path) -> None:
    pixels.write_bytes(pixels.read_bytes()[:-100])


def empty(pixels: Path) -> None:
    pixels.write_bytes(b"")


def remove_pixels(pixels: Path) -> None:
    pixels.unlink()


def remove_side(pixels: Path) -> None:
    pixels.with_suffix(".json").unlink()


def garble_side(pixels: Path) -> None:
    pixels.with_suffix(".json").write_text("[1, 2")


def list_as_side(pixels: Path) -> None:
    pixels.with_suffix(".json").write_text("[]")


def add_skipped(pixels: Path) -> None:
    side = json.loads(pixels.with_suffix(".json").read_text())
    pixels.with_suffix(".json").write_text(json.dumps({**side, "skipped": [["a", "b"]]}))


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_pixel,
        truncate,
        empty,
        remove_pixels,
        remove_side,
        garble_side,
        list_as_side,
        add_skipped,
    ],
)
def test_damaged_cache_is_rebuilt(
    one_folder: Path, cache: Path, decoded: list[int], damage: Any
) -> None:
    expected = np.array(load(one_folder).images)
    damage(next(cache.glob("*.npy")))
    np.testing.assert_array_equal(load(one_folder).images, expected)
    load(one_folder)
    assert decoded == [len(ROWS)] * 2


def test_cache_survives_a_full_disk(
    one_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(one_folder)
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    change_pixels(one_folder)

    def full(stream: Any, *_: Any, **__: Any) -> None:
        stream.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(SkinfastError, match=r"No space left on device; set SKINFAST_CACHE"):
            load(one_folder)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before


def test_disk_full_over_the_side_file(
    one_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(one_folder)
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    change_pixels(one_folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(SkinfastError, match="No space left"):
            load(one_folder)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before


def test_cache_folder_that_cannot_be_written(
    one_folder: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(cache_module.tempfile, "TemporaryFile", read_only)
    with pytest.raises(SkinfastError, match=r"cannot write .*Read-only.*SKINFAST_CACHE"):
        load(one_folder)
    assert decoded == []  # told before the work, not after


def test_cache_folder_that_is_a_file(one_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SkinfastError, match="cannot write the image cache to"):
        load(one_folder, cache_directory=tmp_path / "file" / "cache")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(tmp_path) == tmp_path
    monkeypatch.setenv("SKINFAST_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("SKINFAST_CACHE")
    assert cache_folder() == tmp_path / "b" / "skinfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "c" / ".cache" / "skinfast"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a JPEG or PNG image"),
        (b"plain text, no picture", "not a JPEG or PNG image"),
        (png_header(10_000, 10_000), "10000x10000 pixels, more than 50 megapixels"),
        (png_header(100_000, 100_000), "more than 50 megapixels"),
        (png_header(7, 100), "7x100 pixels, less than 8 on a side"),
        (png_header(100, 7), "100x7 pixels, less than 8 on a side"),
        (png_header(100, 100), "cannot be decoded"),
    ],
    ids=["empty", "text", "100 megapixels", "10 gigapixels", "narrow", "flat", "no data"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_have_a_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadImageError, match=reason):
        decode_image(tmp_path / "a.png", 16)


def test_truncated_jpeg(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", (64, 64))
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadImageError, match="truncated"):
        decode_image(tmp_path / "a.jpg", 16)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (10, 10)).save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png", 8).shape == (8, 8, 3)


def spoil(root: Path) -> None:
    (root / "images" / "ISIC_0000003.jpg").unlink()
    (root / "images" / "ISIC_0000006.jpg").write_bytes(b"no picture")


SPOILT = [
    ("ISIC_0000003", "no such file (.jpg, .jpeg or .png)"),
    ("ISIC_0000006", "not a JPEG or PNG image"),
]


def test_bad_images_are_refused_all_together(one_folder: Path, cache: Path) -> None:
    spoil(one_folder)
    with pytest.raises(SkinfastError) as caught:
        load(one_folder)
    assert str(caught.value) == (
        "2 of 9 images cannot be used: ISIC_0000003 (no such file (.jpg, .jpeg or .png)), "
        "ISIC_0000006 (not a JPEG or PNG image); "
        "mend them, or go on without them with --skip-bad-images"
    )
    assert names(cache) == []


def test_many_bad_images_are_counted(tmp_path: Path) -> None:
    rows = [(f"ISIC_{i:07d}", f"HAM_{i}", "nv") for i in range(30)]
    write_metadata(tmp_path / "HAM10000_metadata.csv", rows)
    for image, _, _ in rows[25:]:
        write_image(tmp_path / f"{image}.jpg")
    with pytest.raises(SkinfastError, match=r"^25 of 30 .*ISIC_0000009 .* and 15 more; mend them"):
        load(tmp_path)


def test_bad_images_can_be_skipped(one_folder: Path, decoded: list[int]) -> None:
    spoil(one_folder)
    for _ in range(2):
        dataset = HAM10000(one_folder, 16, skip_bad_images=True)
        assert dataset.skipped == SPOILT
        left = [row for row in ROWS if row[0] not in dict(SPOILT)]
        assert dataset.image_ids == [image for image, _, _ in left]
        assert dataset.lesion_ids == [lesion for _, lesion, _ in left]
        for image, pixels in zip(dataset.image_ids, dataset.images, strict=True):
            np.testing.assert_array_equal(pixels, reference(one_folder / "images" / f"{image}.jpg"))
    assert decoded == [9, 2, 2]  # the second time only the bad ones are tried again


def test_skipping_does_not_poison_the_cache(one_folder: Path) -> None:
    spoil(one_folder)
    load(one_folder, skip_bad_images=True)
    with pytest.raises(SkinfastError, match="2 of 9 images cannot be used"):
        load(one_folder)
    write_image(one_folder / "images" / "ISIC_0000003.jpg")
    write_image(one_folder / "images" / "ISIC_0000006.jpg")
    assert load(one_folder).skipped == []


def test_image_that_was_unreadable_for_a_while(
    one_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skinfast.data import decoding

    def failing(path: Path, image_size: int) -> np.ndarray:
        if path.stem == "ISIC_0000004":
            raise BadImageError("cannot be decoded: Input/output error")
        return decode_image(path, image_size)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode_image", failing)
        assert len(load(one_folder, skip_bad_images=True).skipped) == 1
    assert load(one_folder, skip_bad_images=True).skipped == []  # though no file has changed


def test_all_images_bad(one_folder: Path) -> None:
    for path in (one_folder / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SkinfastError, match="none of the 9 images can be used: ISIC_0000001"):
        load(one_folder, skip_bad_images=True)


@pytest.mark.parametrize("image_size", [-1, 0, 7, 1025])
def test_image_size_out_of_range(one_folder: Path, image_size: int) -> None:
    with pytest.raises(SkinfastError, match=f"image size {image_size}: choose 8 to 1024"):
        HAM10000(one_folder, image_size)


def test_negative_workers(one_folder: Path) -> None:
    with pytest.raises(SkinfastError, match="num_workers is -1"):
        HAM10000(one_folder, num_workers=-1)


@pytest.mark.parametrize("image_size", [28, 40])
def test_medmnist(tmp_path: Path, image_size: int) -> None:
    arrays = write_medmnist(tmp_path / "dermamnist.npz")
    dataset = HAM10000(tmp_path, image_size)
    pixels = np.concatenate([arrays[f"{part}_images"] for part in ("train", "val", "test")])
    size = (image_size, image_size)
    expected = [
        np.asarray(Image.fromarray(p).resize(size, Image.Resampling.LANCZOS)) for p in pixels
    ]
    np.testing.assert_array_equal(dataset.images, np.stack(expected))
    if image_size == 28:
        np.testing.assert_array_equal(dataset.images, pixels)
    assert dataset.lesion_ids is None


def test_medmnist_images_of_another_shape(tmp_path: Path) -> None:
    arrays = write_medmnist(tmp_path / "dermamnist.npz")
    arrays["val_images"] = arrays["val_images"][..., 0]
    np.savez(tmp_path / "dermamnist.npz", **arrays)
    with pytest.raises(SkinfastError, match=r"val_images is uint8 \[5, 28, 28\], needs uint8"):
        HAM10000(tmp_path, 28)
