"""Augmentation: exact turns, bounded colours, draws from seed, epoch and batch alone."""

import pytest
import torch

from skinfast.training.augmentation import Augmentation, dihedral_views, rotated


@pytest.fixture
def images():
    return torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))


STORED = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("stored", STORED)
def test_turns_are_those_of_rot90_image_by_image(images, stored):
    turns = torch.randint(4, (64,), generator=torch.Generator().manual_seed(2))
    given = STORED[stored](images)
    before = given.clone()
    result = rotated(given, turns)
    for image, turn, turned in zip(images, turns.tolist(), result, strict=True):
        assert torch.equal(turned, torch.rot90(image, turn, (1, 2)))
    assert result.stride() == given.stride()
    assert torch.equal(given, before)


def test_every_turn_comes_up_and_no_pixel_is_lost(images):
    result = Augmentation(rotate=True)(images, 1, 0)
    found = {
        next(k for k in range(4) if torch.equal(turned, torch.rot90(image, k, (1, 2))))
        for image, turned in zip(images, result, strict=True)
    }
    assert found == {0, 1, 2, 3}


def test_draws_follow_from_seed_epoch_and_batch_alone(images):
    augment = Augmentation(rotate=True, color_jitter=0.2, seed=3)
    first = augment(images, 2, 5)
    torch.manual_seed(99)  # the global generator has no say in it
    augment(images, 7, 7)
    assert torch.equal(first, augment(images, 2, 5))
    for other in (
        augment(images, 2, 6),
        augment(images, 3, 5),
        augment(images, 5, 2),
        Augmentation(True, 0.2, seed=4)(images, 2, 5),
    ):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("stored", STORED)
def test_jitter_is_one_gain_and_one_shift_a_colour_within_its_bounds(images, stored):
    given = STORED[stored](images)
    result = Augmentation(color_jitter=0.2)(given, 1, 0)
    assert result.stride() == given.stride()
    centred, jittered = (x - x.mean((2, 3), keepdim=True) for x in (images, result))
    gain = jittered.flatten(1).norm(dim=1) / centred.flatten(1).norm(dim=1)
    assert gain.min() >= 0.8 and gain.max() <= 1.2 and gain.std() > 0.05
    torch.testing.assert_close(jittered, centred * gain[:, None, None, None], atol=1e-5, rtol=1e-4)
    shift = (result - images).mean((2, 3))
    assert shift.abs().max() <= 0.3 and shift.std() > 0.05
    assert (shift - shift.mean(1, keepdim=True)).abs().max() <= 0.2


def test_nothing_asked_for_is_nothing_done(images):
    assert Augmentation()(images, 1, 0) is images


def test_dihedral_views_are_the_eight_symmetries_of_the_square(images):
    given = STORED["channels_last"](images)
    views = dihedral_views(given)
    assert torch.equal(views[0], images)
    assert all(view.stride() == given.stride() for view in views)
    symmetries = {view[0].numpy().tobytes() for view in (v.contiguous() for v in views)}
    assert len(symmetries) == 8
    # Closed under a further turn and under mirroring.
    for change in (lambda x: torch.rot90(x, 1, (1, 2)), lambda x: x.flip(2), lambda x: x.flip(1)):
        assert {change(v[0]).contiguous().numpy().tobytes() for v in views} == symmetries
