"""Find every image of HAM10000 with its label and lesion, in whichever layout it was downloaded.

| layout            | labels                                    | images                        |
|-------------------|-------------------------------------------|-------------------------------|
| one folder        | ``HAM10000_metadata.csv``                 | ``images/*.jpg``              |
| Kaggle            | ``HAM10000_metadata.csv``                 | ``HAM10000_images_part_1/``.. |
| Harvard Dataverse | ``HAM10000_metadata`` (or ``.tab``)       | its two part archives         |
| ISIC 2018 Task 3  | ``ISIC2018_Task3_Training_GroundTruth.csv`` | ``..._Training_Input/``     |
| MedMNIST          | ``dermamnist.npz``, ``dermamnist_64.npz``, ... | in the same file         |

Folders are searched recursively and images are found by name, so how they are nested is of no
importance, and pictures that the labels do not mention (test sets, masks) are left aside.
"""

from __future__ import annotations

import os
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from skinfast.data import medmnist
from skinfast.data.metadata import (
    Diagnosis,
    read_ham10000_metadata,
    read_isic2018_ground_truth,
    require_agreement,
)
from skinfast.errors import SkinfastError

METADATA_NAMES = ("HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")
GROUND_TRUTH_NAME = "ISIC2018_Task3_Training_GroundTruth.csv"
GROUPINGS_NAME = "ISIC2018_Task3_Training_LesionGroupings.csv"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Record:
    """One labelled image.

    Attributes:
        image_id: unique name, such as ``ISIC_0024306``.
        lesion_id: the photographed lesion; None where the layout does not tell.
        label: index into ``CLASSES``.
        path: the file that holds it; None when there is no such file.
        row: where the file is an ``.npz``, the row of ``medmnist.read_images`` that it is.
    """

    image_id: str
    lesion_id: str | None
    label: int
    path: Path | None
    row: int | None = None


def find_records(root: str | os.PathLike[str], image_size: int = 64) -> list[Record]:
    """List every labelled image under ``root``, sorted by image_id (MedMNIST: in file order).

    The order does not depend on the layout, so neither do splits. Images that the labels name
    but that have no file are listed with ``path=None``. Where label files and MedMNIST files lie
    side by side the label files are taken: only they tell lesions apart.

    Args:
        root: a folder in any of the layouts above, or a MedMNIST ``.npz`` file.
        image_size: the size wanted later; it chooses among several MedMNIST files.

    Raises:
        SkinfastError: no such folder, no label file, a label file that cannot be used, label
            files that contradict each other, two different files for one image, or images that
            are still inside a zip archive.
    """
    root = Path(root).expanduser()
    if root.is_file():
        if root.suffix.lower() == ".npz":
            return _medmnist_records(root)
        raise SkinfastError(
            f"{root} is a file; give the folder that holds the unpacked images and their metadata"
        )
    if not root.is_dir():
        raise SkinfastError(f"no such folder: {root}; give the folder that holds HAM10000")

    files = sorted(_walk(root))
    diagnoses = _read_diagnoses(files)
    if diagnoses is not None:
        return _match_images(root, files, diagnoses)
    arrays = [path for path in files if medmnist.FILE_NAME.fullmatch(path.name)]
    if arrays:
        return _medmnist_records(medmnist.choose_file(arrays, image_size))

    looked_for = f"{', '.join(METADATA_NAMES)}, {GROUND_TRUTH_NAME} or dermamnist*.npz"
    archives = [path.name for path in files if path.suffix.lower() == ".zip"]
    mend = f"unpack {', '.join(archives)} there" if archives else "download it beside the images"
    raise SkinfastError(f"no metadata in {root}: looked for {looked_for}; {mend}")


def metadata_tables(root: str | os.PathLike[str]) -> list[Path]:
    """The ``HAM10000_metadata`` tables under a data folder, sorted; none for a single file."""
    root = Path(root).expanduser()
    if not root.is_dir():
        return []
    return sorted(path for path in _walk(root) if path.name in METADATA_NAMES)


def _walk(root: Path) -> Iterator[Path]:
    """Every file under ``root``, links followed, no folder entered twice."""

    def fail(error: OSError) -> None:
        raise SkinfastError(
            f"cannot read the folder {error.filename}: {error.strerror}; make it readable"
        ) from error

    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up would lead round for ever
            subfolders.clear()
            continue
        seen.add(real)
        yield from (Path(folder, name) for name in names)


def _read_diagnoses(files: list[Path]) -> dict[str, Diagnosis] | None:
    tables = [(p, read_ham10000_metadata(p)) for p in files if p.name in METADATA_NAMES]
    groupings = [path for path in files if path.name == GROUPINGS_NAME]
    tables += [
        (path, read_isic2018_ground_truth(path, groupings))
        for path in files
        if path.name == GROUND_TRUTH_NAME
    ]
    if not tables:
        return None
    require_agreement(tables)
    return tables[0][1]


def _match_images(root: Path, files: list[Path], diagnoses: dict[str, Diagnosis]) -> list[Record]:
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files:
        is_image = path.suffix.lower() in IMAGE_SUFFIXES and path.stem in diagnoses
        if is_image and path.is_file():  # a broken link is no file
            found[path.stem].append(path)
    missing = diagnoses.keys() - found.keys()
    if missing:
        _refuse_packed(root, files, missing)
    return [
        Record(
            image_id,
            diagnoses[image_id].lesion_id,
            diagnoses[image_id].label,
            _only_file(image_id, found[image_id]) if image_id in found else None,
        )
        for image_id in sorted(diagnoses)
    ]


def _only_file(image_id: str, paths: list[Path]) -> Path:
    # Kaggle's archive holds each part twice, under names that differ in case: equal copies are
    # common and harmless. Another size in bytes means another picture, and no guess is right.
    if len(paths) > 1 and len({path.stat().st_size for path in paths}) > 1:
        raise SkinfastError(
            f"image {image_id} is there in two different files, {paths[0]} and {paths[1]}; "
            "move one of the two sets of images elsewhere"
        )
    return paths[0]


def _refuse_packed(root: Path, files: list[Path], missing: Iterable[str]) -> None:
    """Raise SkinfastError if images that are missing lie in a zip archive nearby."""
    wanted = set(missing)
    packed: dict[str, int] = {}
    for archive in files:
        if archive.suffix.lower() != ".zip":
            continue
        try:
            with zipfile.ZipFile(archive) as opened:
                stems = {PurePosixPath(name).stem for name in opened.namelist()}
        except (OSError, zipfile.BadZipFile):
            continue  # whatever it is, it is not where the images can be taken from
        if stems & wanted:
            packed[str(archive.relative_to(root))] = len(stems & wanted)
    if packed:
        listed = ", ".join(f"{name} ({count} images)" for name, count in packed.items())
        raise SkinfastError(f"images in {root} are still packed; unpack {listed}")


def _medmnist_records(path: Path) -> list[Record]:
    return [
        Record(image_id, None, label, path, row)
        for row, (image_id, label) in enumerate(medmnist.read_labels(path))
    ]
