from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from skinfast.data import CLASSES, SyntheticLesions, make_split
from skinfast.data.synthetic import class_sizes
from skinfast.errors import SkinfastError


@pytest.fixture(scope="module")
def lesions() -> SyntheticLesions:
    return SyntheticLesions(400, 32)


def test_parts(lesions: SyntheticLesions) -> None:
    assert lesions.images.shape == (400, 32, 32, 3)
    assert lesions.images.dtype == torch.uint8
    assert lesions.class_counts() == class_sizes(400)
    assert len(set(lesions.image_ids)) == 400
    assert lesions.source == "synthetic images (seed 0)"


def test_seed_decides(lesions: SyntheticLesions) -> None:
    again, other = SyntheticLesions(400, 32), SyntheticLesions(400, 32, seed=1)
    assert torch.equal(lesions.images, again.images)
    assert torch.equal(lesions.labels, again.labels)
    assert lesions.lesion_ids == again.lesion_ids
    assert not torch.equal(lesions.images, other.images)
    assert not torch.equal(lesions.labels, other.labels)


def test_another_process_draws_the_same() -> None:
    code = (
        "import hashlib; from skinfast.data import SyntheticLesions; "
        "print(hashlib.sha256(SyntheticLesions(40, 16).images.numpy().tobytes()).hexdigest())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [
        (10_015, [327, 514, 1099, 115, 1113, 6705, 142]),
        (3000, [98, 154, 329, 34, 333, 2009, 43]),
        (100, [5, 5, 11, 5, 11, 58, 5]),
        (35, [5] * 7),
    ],
)
def test_class_sizes(num_images: int, expected: list[int]) -> None:
    assert list(class_sizes(num_images).values()) == expected


@pytest.mark.parametrize("num_images", range(35, 400, 13))
def test_class_sizes_add_up(num_images: int) -> None:
    sizes = class_sizes(num_images)
    assert sum(sizes.values()) == num_images
    assert min(sizes.values()) >= 5


def test_lesions_have_one_label_and_up_to_three_views(lesions: SyntheticLesions) -> None:
    groups = lesions.groups()
    views = np.bincount(groups)
    assert set(views) == {1, 2, 3}
    assert 1.2 < views.mean() < 1.5
    for group in range(len(views)):
        assert len(set(lesions.labels.numpy()[groups == group])) == 1
    make_split(lesions, "lesion", 0)


def test_views_of_a_lesion_differ_but_resemble(lesions: SyntheticLesions) -> None:
    groups = lesions.groups()
    colours = lesions.images.float().mean(dim=(1, 2))
    same, order = [], np.argsort(groups, kind="stable")
    for a, b in itertools.pairwise(order):
        if groups[a] == groups[b]:
            assert not torch.equal(lesions.images[a], lesions.images[b])
            same.append((colours[a] - colours[b]).norm())
    everything = torch.cdist(colours, colours)
    assert torch.stack(same).mean() < 0.7 * everything.mean()


def test_colours_are_like_skin(lesions: SyntheticLesions) -> None:
    red, green, blue = (lesions.images[..., c].float().mean().item() for c in range(3))
    assert 160 < red < 215
    assert 110 < green < 170
    assert 110 < blue < 170
    assert lesions.images.float().std() > 20


def test_sizes_show_the_same_lesions() -> None:
    small, large = SyntheticLesions(40, 16), SyntheticLesions(40, 64)
    assert torch.equal(small.labels, large.labels)
    pooled = torch.nn.functional.avg_pool2d(large.images.permute(0, 3, 1, 2).float(), 4)
    difference = (pooled - small.images.permute(0, 3, 1, 2).float()).abs().mean()
    assert difference < 12


def test_classes_can_be_told_apart_but_not_all() -> None:
    from sklearn.linear_model import LogisticRegression

    lesions = SyntheticLesions(900, 16)
    split = make_split(lesions, "image", 0)
    centre = lesions.images[:, 4:12, 4:12].float().div(255)
    features = torch.cat([centre.mean((1, 2)), centre.std((1, 2))], dim=1).numpy()
    labels = lesions.labels.numpy()
    model = LogisticRegression(C=100, max_iter=2000).fit(features[split.train], labels[split.train])
    predicted = model.predict(features[split.test])
    majority = np.mean(labels == CLASSES.index("nv"))
    assert majority + 0.03 < np.mean(predicted == labels[split.test]) < 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 34}, "34 synthetic images are too few for 7 classes; choose 35 or more"),
        ({"image_size": 7}, "image size 7: choose 8 to 1024"),
        ({"image_size": 1025}, "image size 1025: choose 8 to 1024"),
        ({"seed": -1}, "seed is -1; choose 0 or more"),
    ],
)
def test_refusals(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(SkinfastError, match=message):
        SyntheticLesions(**arguments)
