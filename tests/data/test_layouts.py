from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from skinfast.data import find_records
from skinfast.data.layouts import Record
from skinfast.errors import SkinfastError

from .folders import (
    LABELS,
    ROWS,
    Row,
    write_ground_truth,
    write_groupings,
    write_image,
    write_medmnist,
    write_metadata,
)

METADATA = "HAM10000_metadata.csv"


def build_one_folder(root: Path) -> None:
    for image, _, _ in ROWS:
        write_image(root / "images" / f"{image}.jpg")
    write_metadata(root / METADATA)


def build_kaggle(root: Path) -> None:
    for i, (image, _, _) in enumerate(ROWS):
        write_image(root / f"HAM10000_images_part_{1 + i % 2}" / f"{image}.jpg")
        # The archive really holds both, one a copy of the other.
        write_image(root / f"ham10000_images_part_{1 + i % 2}" / f"{image}.jpg")
    write_metadata(root / METADATA)
    (root / "hmnist_28_28_RGB.csv").write_text("pixel0000,label\n1,2\n")


def build_dataverse(root: Path) -> None:
    for i, (image, _, _) in enumerate(ROWS):
        write_image(root / f"HAM10000_images_part_{1 + i % 2}" / f"{image}.jpg")
    write_metadata(root / "HAM10000_metadata")
    write_image(root / "ISIC2018_Task3_Test_Images" / "ISIC_0034524.jpg")
    write_image(root / "segmentations" / "ISIC_0000001_segmentation.png")


def build_dataverse_tab(root: Path) -> None:
    build_dataverse(root)
    (root / "HAM10000_metadata").unlink()
    write_metadata(root / "HAM10000_metadata.tab", delimiter="\t")


def build_isic(root: Path) -> None:
    truth = root / "ISIC2018_Task3_Training_GroundTruth"
    write_ground_truth(truth / "ISIC2018_Task3_Training_GroundTruth.csv")
    write_groupings(truth / "ISIC2018_Task3_Training_LesionGroupings.csv")
    for image, _, _ in ROWS:
        write_image(root / "nested" / "ISIC2018_Task3_Training_Input" / f"{image}.jpg")


@pytest.mark.parametrize(
    "build", [build_one_folder, build_kaggle, build_dataverse, build_dataverse_tab, build_isic]
)
def test_every_layout_gives_the_same_records(tmp_path: Path, build: Callable[[Path], None]) -> None:
    root = tmp_path / "data"
    root.mkdir()
    build(root)
    records = find_records(root)
    assert [record.image_id for record in records] == [image for image, _, _ in ROWS]
    assert [record.lesion_id for record in records] == [lesion for _, lesion, _ in ROWS]
    assert [record.label for record in records] == LABELS
    for record in records:
        assert record.path is not None
        assert record.path.stem == record.image_id
        assert record.path.is_file()


def test_isic_without_groupings_has_no_lesions(tmp_path: Path) -> None:
    build_isic(tmp_path)
    next(tmp_path.rglob("*LesionGroupings.csv")).unlink()
    assert {record.lesion_id for record in find_records(tmp_path)} == {None}


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".png"])
def test_image_suffixes(tmp_path: Path, suffix: str) -> None:
    write_metadata(tmp_path / METADATA, ROWS[:1])
    write_image(tmp_path / f"{ROWS[0][0]}{suffix}")
    assert find_records(tmp_path)[0].path == tmp_path / f"{ROWS[0][0]}{suffix}"


def test_records_are_sorted_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    build_one_folder(tmp_path)
    expected = find_records(tmp_path)
    write_metadata(tmp_path / METADATA, ROWS[::-1])
    assert find_records(tmp_path) == expected


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    build_one_folder(tmp_path)
    text = (tmp_path / METADATA).read_text()
    (tmp_path / METADATA).write_text("\ufeff" + text, encoding="utf-8")
    assert len(find_records(tmp_path)) == len(ROWS)


def test_linked_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    build_one_folder(tmp_path / "real")
    root = tmp_path / "root"
    root.mkdir()
    (root / "data").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(root)
    assert [record.label for record in find_records(root)] == LABELS


def test_missing_images_are_listed_without_a_path(one_folder: Path) -> None:
    for image in ("ISIC_0000002", "ISIC_0000005"):
        (one_folder / "images" / f"{image}.jpg").unlink()
    missing = [record.image_id for record in find_records(one_folder) if record.path is None]
    assert missing == ["ISIC_0000002", "ISIC_0000005"]


def test_broken_link_is_a_missing_image(one_folder: Path) -> None:
    image = one_folder / "images" / "ISIC_0000001.jpg"
    image.unlink()
    image.symlink_to(one_folder / "nowhere.jpg")
    assert find_records(one_folder)[0].path is None


def test_two_label_files_that_agree(one_folder: Path) -> None:
    write_ground_truth(one_folder / "ISIC2018_Task3_Training_GroundTruth.csv")
    assert find_records(one_folder)[0].lesion_id == "HAM_1"


@pytest.mark.parametrize(
    "rows",
    [
        [*ROWS[:-1], ("ISIC_0000009", "HAM_9", "nv")],
        ROWS[:-1],
        [*ROWS[:-1], ("ISIC_0000010", "HAM_9", "vasc")],
    ],
    ids=["label", "fewer", "other image"],
)
def test_two_label_files_that_contradict(one_folder: Path, rows: list[Row]) -> None:
    write_ground_truth(one_folder / "ISIC2018_Task3_Training_GroundTruth.csv", rows)
    with pytest.raises(SkinfastError, match=r"contradict each other about ISIC_00000(09|10); rem"):
        find_records(one_folder)


def test_two_metadata_files_with_other_lesions_contradict(one_folder: Path) -> None:
    write_metadata(one_folder / "HAM10000_metadata", [(a, f"{b}x", c) for a, b, c in ROWS])
    with pytest.raises(SkinfastError, match="contradict each other about ISIC_0000001"):
        find_records(one_folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SkinfastError, match=r"no such folder: .*nowhere; give the folder"):
        find_records(tmp_path / "nowhere")


def test_a_file_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(SkinfastError, match="is a file; give the folder"):
        find_records(tmp_path / "data.zip")


def test_no_metadata_names_what_was_looked_for(tmp_path: Path) -> None:
    write_image(tmp_path / "ISIC_0000001.jpg")
    with pytest.raises(SkinfastError) as caught:
        find_records(tmp_path)
    for name in ("HAM10000_metadata.csv", "ISIC2018_Task3_Training_GroundTruth.csv", "dermamnist"):
        assert name in str(caught.value)


def test_no_metadata_but_an_archive(tmp_path: Path) -> None:
    (tmp_path / "archive.zip").write_bytes(b"PK")
    with pytest.raises(SkinfastError, match=r"unpack archive\.zip there"):
        find_records(tmp_path)


def test_images_still_in_an_archive(tmp_path: Path) -> None:
    build_dataverse(tmp_path)
    part = tmp_path / "HAM10000_images_part_2"
    with zipfile.ZipFile(tmp_path / "HAM10000_images_part_2.zip", "w") as archive:
        for image in part.iterdir():
            archive.write(image, image.name)
    assert len(find_records(tmp_path)) == len(ROWS)  # unpacked already: the archive may stay
    for image in part.iterdir():
        image.unlink()
    with pytest.raises(SkinfastError, match=r"unpack HAM10000_images_part_2\.zip \(4 images\)"):
        find_records(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; use the original file"),
        ("lesion_id,image_id,dx\n", "is empty; use the original file"),
        ("lesion_id,image_id\nHAM_1,ISIC_1\n", r"no column dx \(its columns: lesion_id, image_id"),
        (
            "lesion_id,image_id,dx\nHAM_1,ISIC_1,xyz\n",
            "row 2 .ISIC_1.: unknown diagnosis 'xyz'; .*akiec, bcc, bkl, df, mel, nv, vasc",
        ),
        ("lesion_id,image_id,dx\nHAM_1,ISIC_1,nv\nHAM_1,ISIC_1,nv\n", "row 3: image ISIC_1 was"),
        ("lesion_id,image_id,dx\nHAM_1,,nv\n", "row 2: image_id is empty"),
        ("lesion_id,image_id,dx\nHAM_1,ISIC_1\n", "row 2: dx is empty"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / METADATA).write_text(text)
    with pytest.raises(SkinfastError, match=message) as caught:
        find_records(tmp_path)
    assert "\n" not in str(caught.value)


def test_metadata_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(SkinfastError, match=r"cannot read .*HAM10000_metadata\.csv"):
        find_records(tmp_path)


@pytest.mark.parametrize("marks", ["0,0,0,0,0,0,0", "1,1,0,0,0,0,0", "1,x,0,0,0,0,0", "1,0"])
def test_ground_truth_that_is_not_one_hot(tmp_path: Path, marks: str) -> None:
    text = f"image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\nISIC_1,{marks}\n"
    (tmp_path / "ISIC2018_Task3_Training_GroundTruth.csv").write_text(text)
    with pytest.raises(SkinfastError, match=r"row 2 \(ISIC_1\): needs a 1 in exactly one"):
        find_records(tmp_path)


def test_groupings_that_lack_an_image(tmp_path: Path) -> None:
    build_isic(tmp_path)
    write_groupings(next(tmp_path.rglob("*LesionGroupings.csv")), ROWS[1:])
    with pytest.raises(SkinfastError, match="has no lesion for ISIC_0000001"):
        find_records(tmp_path)


def test_two_different_files_for_one_image(one_folder: Path) -> None:
    write_image(one_folder / "large" / "ISIC_0000003.jpg", (60, 45))
    with pytest.raises(SkinfastError, match="ISIC_0000003 is there in two different files"):
        find_records(one_folder)


def test_medmnist_file_and_folder(tmp_path: Path) -> None:
    arrays = write_medmnist(tmp_path / "dermamnist.npz")
    records = find_records(tmp_path / "dermamnist.npz")
    assert records == find_records(tmp_path)
    labels = np.concatenate([arrays[f"{part}_labels"] for part in ("train", "val", "test")])
    assert [record.label for record in records] == labels.ravel().tolist()
    assert records[5] == Record("val_00000", None, records[5].label, tmp_path / "dermamnist.npz", 5)


@pytest.mark.parametrize(
    ("image_size", "chosen"), [(28, 28), (32, 64), (64, 64), (100, 128), (200, 128)]
)
def test_medmnist_size_is_chosen(tmp_path: Path, image_size: int, chosen: int) -> None:
    for side, name in ((28, ""), (64, "_64"), (128, "_128")):
        write_medmnist(tmp_path / f"dermamnist{name}.npz", side, num_images=1)
    name = {28: "dermamnist.npz", 64: "dermamnist_64.npz", 128: "dermamnist_128.npz"}[chosen]
    assert find_records(tmp_path, image_size)[0].path == tmp_path / name


def test_medmnist_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "dermamnist.npz"
    path.write_bytes(b"not an archive")
    with pytest.raises(SkinfastError, match=r"cannot read .*dermamnist\.npz.*download it again"):
        find_records(path)
    arrays = write_medmnist(path)
    np.savez(path, **{k: v for k, v in arrays.items() if k != "val_labels"})
    with pytest.raises(SkinfastError, match="has no array val_labels"):
        find_records(path)
    np.savez(path, **{**arrays, "test_labels": np.array([[7]])})
    with pytest.raises(SkinfastError, match="test_labels must be integers from 0 to 6"):
        find_records(path)
