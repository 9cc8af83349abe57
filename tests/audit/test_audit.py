"""The audit finds what was planted in a data folder, and nothing else."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from skinfast import cli
from skinfast.audit import audit, write_audit
from skinfast.audit.duplicates import correlation, find_pairs, oriented, perceptual_hashes
from skinfast.audit.metadata_leak import metadata_leaks
from skinfast.errors import SkinfastError
from tests.conftest import CLASS_SIZES
from tests.report.test_report import Page

COLUMNS = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"]


def picture(seed, side=64):
    """Soft coloured blots, uint8 ``[side, side, 3]``; no two seeds look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def write_rows(root, rows):
    with (root / "HAM10000_metadata.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(root):
    with (root / "HAM10000_metadata.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """108 different pictures of 108 lesions; age tells the class, sex does not."""
    root = tmp_path_factory.mktemp("clean") / "ham10000"
    (root / "images").mkdir(parents=True)
    rows, generator = [], np.random.default_rng(0)
    for number, dx in enumerate(dx for dx, size in CLASS_SIZES.items() for _ in range(size)):
        name = f"ISIC_{number:03}"
        Image.fromarray(picture(number)).save(root / "images" / f"{name}.png")
        values = (f"HAM_{number:03}", name, dx, "histo", 10 * list(CLASS_SIZES).index(dx),
                  generator.choice(["male", "female"]), "back")  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    write_rows(root, rows)
    return root


@pytest.fixture
def folder(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "ham10000")


def images_of(pair):
    return tuple(pair["images"])


def test_nothing_is_found_where_nothing_is(clean):
    findings = audit(str(clean)).findings
    assert findings["summary"] == {
        "test_images_of_training_lesions": 0,
        "identical_pairs": 0,
        "identical_pairs_across_split": 0,
        "near_identical_pairs": 0,
        "near_identical_pairs_across_split": 0,
        "pairs_of_different_lesions": 0,
        "lesions_with_conflicting_labels": 0,
        "pairs_with_conflicting_labels": 0,
        "unreadable_images": 0,
    }
    assert (findings["num_train"], findings["num_test"]) == (86, 22)


def test_planted_copies_are_found_as_what_they_are(folder):
    images = folder / "images"
    shutil.copy(images / "ISIC_050.png", images / "ISIC_060.png")
    # Other light, turned and mirrored, none of which a file comparison or a plain hash would see.
    darker = (picture(51) * 0.6 + 40).astype(np.uint8)
    Image.fromarray(darker).save(images / "ISIC_061.png")
    Image.fromarray(np.rot90(picture(52)[:, ::-1])).save(images / "ISIC_062.png")
    found = audit(str(folder)).findings
    pairs = {images_of(pair): pair for pair in found["pairs"]}
    assert pairs.keys() == {
        ("ISIC_050", "ISIC_060"),
        ("ISIC_051", "ISIC_061"),
        ("ISIC_052", "ISIC_062"),
    }
    identical, light, turned = (pairs[key] for key in sorted(pairs))
    assert identical["identical"] and identical["correlation"] == pytest.approx(1)
    assert not light["identical"] and light["correlation"] > 0.999
    assert (light["turned"], light["mirrored"]) == (0, False)
    assert (turned["turned"], turned["mirrored"]) == (1, True)
    assert found["summary"]["pairs_of_different_lesions"] == 3
    assert found["summary"]["identical_pairs"] == 1
    assert found["summary"]["near_identical_pairs"] == 2


def test_pairs_across_the_split_are_those_of_the_split(folder):
    from skinfast.data import HAM10000, make_split

    for k in range(20):
        shutil.copy(
            folder / f"images/ISIC_{k + 45:03}.png", folder / f"images/ISIC_{k + 70:03}.png"
        )
    split = make_split(HAM10000(folder, 64), "image", 3)
    names = {f"ISIC_{i:03}" for i in split.test}
    found = audit(str(folder), seed=3).findings
    assert len(found["pairs"]) == 20
    across = [(a in names) != (b in names) for a, b in map(images_of, found["pairs"])]
    assert [pair["across_split"] for pair in found["pairs"]] == across
    assert found["summary"]["identical_pairs_across_split"] == sum(across) > 0
    for pair in found["pairs"]:
        assert pair["sides"] == ["test" if i in names else "train" for i in pair["images"]]


def test_lesions_across_the_split_are_counted_and_a_split_by_lesion_has_none(folder):
    from skinfast.data import HAM10000, make_split

    rows = read_rows(folder)
    for number, row in enumerate(rows):
        row["lesion_id"] = f"HAM_{row['dx']}_{number // 2}"
    write_rows(folder, rows)
    dataset = HAM10000(folder, 64)
    split, lesions = make_split(dataset, "image", 0), np.array(dataset.lesion_ids)
    shared = [lesion in set(lesions[split.train]) for lesion in lesions[split.test]]
    found = audit(str(folder)).findings["lesions"]
    assert found["test_images_of_training_lesions"] == sum(shared) > 0
    assert found["share_of_test"] == sum(shared) / 22
    assert found["num_lesions_on_both_sides"] == len(set(lesions[split.test][shared]))
    by_lesion = audit(str(folder), "lesion").findings["lesions"]
    assert by_lesion["test_images_of_training_lesions"] == 0


def test_conflicts_of_labels_are_named(folder):
    rows = read_rows(folder)
    rows[40]["lesion_id"] = rows[0]["lesion_id"]  # a melanoma and an akiec
    write_rows(folder, rows)
    shutil.copy(folder / "images/ISIC_045.png", folder / "images/ISIC_010.png")  # nv and bcc
    found = audit(str(folder)).findings["label_conflicts"]
    assert found["lesions"] == [
        {"lesion": "HAM_000", "images": ["ISIC_000", "ISIC_040"], "classes": ["akiec", "mel"]}
    ]
    assert [images_of(pair) for pair in found["pairs"]] == [("ISIC_010", "ISIC_045")]
    assert found["pairs"][0]["classes"] == ["bcc", "nv"]


def test_unreadable_files_do_not_stop_the_audit(folder):
    (folder / "images/ISIC_070.png").write_bytes(b"no image")
    (folder / "images/ISIC_071.png").unlink()
    found = audit(str(folder)).findings
    assert [entry[0] for entry in found["unreadable"]] == ["ISIC_070", "ISIC_071"]
    assert found["num_images"] == 106


def test_telling_columns_are_told_from_silent_ones(clean):
    leaks = {tuple(leak["columns"]): leak for leak in audit(str(clean)).findings["metadata"]}
    # dx_type and localization have one value each and can tell nothing.
    assert leaks.keys() == {("age",), ("sex",), ("age", "sex")}
    assert leaks["age",]["above_chance"] and leaks["age",]["balanced_accuracy"] > 0.4
    assert not leaks["sex",]["above_chance"]
    assert leaks["age",]["chance"] == pytest.approx(1 / 7)


def test_leaks_are_measured_on_lesions_that_were_not_seen():
    # Every lesion has a code of its own, twelve photographs each: only a fold by image could
    # profit from it.
    groups = np.arange(60).repeat(12)
    labels = np.random.default_rng(0).integers(0, 3, 60)[groups]
    columns = {"code": groups.astype(str), "dx_type": labels.astype(str)}
    leaks = {tuple(leak["columns"]): leak for leak in metadata_leaks(columns, labels, groups)}
    assert leaks["code",]["balanced_accuracy"] < 0.45
    assert leaks["dx_type",]["balanced_accuracy"] == 1.0
    assert leaks["dx_type",]["after_diagnosis"] and not leaks["code",]["after_diagnosis"]


def test_too_few_images_to_cross_validate():
    labels = np.array([0] * 20 + [1] * 3)
    assert metadata_leaks({"sex": labels.astype(str)}, labels, np.arange(23)) == []


def test_medmnist_has_no_lesions_and_no_columns(tmp_path):
    from tests.data.folders import write_medmnist

    write_medmnist(tmp_path / "dermamnist.npz", num_images=60)
    found = audit(str(tmp_path / "dermamnist.npz")).findings
    assert found["lesions"] is None and found["metadata"] == []
    assert found["summary"]["pairs_of_different_lesions"] is None


@pytest.mark.parametrize("orientation", range(8))
def test_every_orientation_is_found(orientation):
    images = np.stack([picture(k) for k in range(12)])
    images[7] = oriented(images[2], orientation)
    (pair,) = find_pairs(images, None)
    assert (pair.first, pair.second) == (2, 7)
    assert (pair.turned, pair.mirrored) == (orientation % 4, orientation >= 4)
    assert pair.identical == (orientation == 0)


def test_correlation_is_numpys():
    a, b = picture(0), picture(1)
    centred = [(x - x.mean((0, 1))).ravel() for x in (a, b)]
    assert correlation(a[None], b[None])[0] == pytest.approx(np.corrcoef(*centred)[0, 1], abs=1e-6)
    flat = np.full((1, 64, 64, 3), 200, np.uint8)
    assert correlation(flat, flat)[0] == 0 and correlation(flat, a[None])[0] == 0


def test_hashes_change_little_with_light_and_much_with_content():
    images = np.stack([picture(0), (picture(0) * 0.7 + 30).astype(np.uint8), picture(1)])
    hashes = perceptual_hashes(images)
    assert hashes.shape == (3, 63)
    assert (hashes[0] != hashes[1]).sum() <= 2
    assert (hashes[0] != hashes[2]).sum() > 15


def test_page_shows_the_pairs_and_is_self_contained(folder, tmp_path):
    shutil.copy(folder / "images/ISIC_045.png", folder / "images/ISIC_010.png")
    (folder / "images/ISIC_070.png").write_bytes(b"no image")
    path = write_audit(audit(str(folder)), tmp_path / "out")
    page = Page(path.read_text(encoding="utf-8"))
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in page.elements)
    assert [image["alt"] for image in page.all("img")] == [
        f"ISIC_010, Basal cell carcinoma, {json_side(tmp_path, 0)} image",
        f"ISIC_045, Melanocytic nevi, {json_side(tmp_path, 1)} image",
    ]
    assert all((image["src"] or "").startswith("data:image/png") for image in page.all("img"))
    words = page.words()
    assert "✗ different classes" in words and "✗ different lesions" in words
    assert "ISIC_070 not a JPEG or PNG image" in words
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def json_side(tmp_path, number):
    findings = json.loads((tmp_path / "out" / "audit.json").read_text())
    return findings["pairs"][0]["sides"][number]


def test_names_from_the_data_are_escaped(folder, tmp_path):
    rows = read_rows(folder)
    rows[0]["lesion_id"] = rows[40]["lesion_id"] = "<b>HAM</b>"
    write_rows(folder, rows)
    html = write_audit(audit(str(folder)), tmp_path / "out").read_text()
    assert "<b>" not in html and "&lt;b&gt;HAM" in html


def test_command(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["audit", "--data", str(folder), "--output", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "test images of training lesions, split by image   0 (0.0% of 22)" in lines
    assert lines[-1] == f"report: {out / 'audit.html'}"
    assert cli.main(["audit", "--data", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "audit.json").read_text())


def test_two_audits_are_equal(folder, tmp_path):
    pages = [write_audit(audit(str(folder)), tmp_path / name).read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


def test_bad_input_is_one_line(clean, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert cli.main(["audit", "--data", str(clean), "--output", str(tmp_path / "file")]) == 2
    assert "is a file; choose another --output" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
    assert cli.main(["audit", "--data", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["audit", "--data", str(clean), "--seed", "-1"]) == 2
    assert "--seed is -1; it needs to be from 0" in capsys.readouterr().err
    with pytest.raises(SkinfastError, match="choose image or lesion"):
        audit(str(clean), "patient")
