from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from skinfast.data import DeviceBatches
from skinfast.errors import SkinfastError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (23, 8, 8, 3), dtype=torch.uint8, generator=GENERATOR)
# Labels are the images' numbers, to tell which image a batch holds.
NUMBERS = torch.arange(23)
MEAN, STD = (0.76, 0.55, 0.57), (0.14, 0.15, 0.17)
EVERYTHING: dict[str, Any] = {"augment": True, "rotate": True, "color_jitter": 0.2}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


def batches(**changes: Any) -> DeviceBatches:
    options: dict[str, Any] = {
        "images": IMAGES,
        "labels": NUMBERS,
        "indices": np.arange(23),
        "batch_size": 5,
        "device": "cpu",
        "mean": MEAN,
        "std": STD,
        "shuffle": True,
    }
    return DeviceBatches(**{**options, **changes})


def normalised(numbers: torch.Tensor) -> torch.Tensor:
    values = IMAGES[numbers].double() / 255
    values = (values - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    return values.permute(0, 3, 1, 2)


def order(loader: DeviceBatches) -> list[int]:
    return torch.cat([labels for _, labels in loader]).tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("layout", "in_memory"),
    [
        ("contiguous", (0, 1, 2, 3)),
        ("channels_last", (0, 2, 3, 1)),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_equal_to_the_plain_way(
    device: str, layout: str, in_memory: tuple[int, ...], shuffle: bool
) -> None:
    loader = batches(device=device, layout=layout, shuffle=shuffle)
    for images, numbers in loader:
        assert images.device.type == numbers.device.type == device
        assert images.dtype == torch.float32
        assert numbers.dtype == torch.int64
        assert images.permute(in_memory).is_contiguous()
        expected = normalised(numbers.cpu()).float()
        torch.testing.assert_close(images.cpu(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(device: str, dtype: torch.dtype) -> None:
    if device == "cpu" and dtype == torch.float16:
        pytest.skip("float16 is for GPUs")
    for images, numbers in batches(device=device, dtype=dtype):
        assert images.dtype == dtype
        expected = normalised(numbers.cpu())
        torch.testing.assert_close(images.cpu().double(), expected, rtol=1e-2, atol=1e-2)


def test_layouts_hold_the_same_values() -> None:
    first, *others = (
        torch.cat([images for images, _ in batches(layout=layout, augment=True)])
        for layout in ("contiguous", "channels_last")
    )
    for other in others:
        assert torch.equal(other, first)


def test_images_stored_in_another_order() -> None:
    stored = IMAGES.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for (images, _), (expected, _) in zip(batches(images=stored), batches(), strict=True):
        assert torch.equal(images, expected)


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"),
    [
        (5, False, [5, 5, 5, 5, 3]),
        (5, True, [5, 5, 5, 5]),
        (23, True, [23]),
        (100, False, [23]),
        (1, True, [1] * 23),
    ],
)
def test_batch_sizes(batch_size: int, drop_last: bool, sizes: list[int]) -> None:
    loader = batches(batch_size=batch_size, drop_last=drop_last)
    assert len(loader) == len(sizes)
    assert [len(labels) for _, labels in loader] == sizes


def test_without_shuffle_in_the_order_of_the_indices() -> None:
    indices = [4, 4, 20, 0, 7, 7, 7]
    assert order(batches(indices=indices, shuffle=False)) == indices


def test_every_image_once_an_epoch() -> None:
    loader = batches(indices=np.arange(3, 20))
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert sorted(order(loader)) == list(range(3, 20))


def test_order_follows_from_seed_and_epoch_alone() -> None:
    orders = []
    for seed in range(3):
        for epoch in range(3):
            loader = batches(seed=seed)
            loader.set_epoch(epoch)
            assert order(loader) == order(loader)
            other = batches(seed=seed, batch_size=7, augment=True)
            other.set_epoch(epoch)
            assert order(loader) == order(other)
            orders.append(tuple(order(loader)))
    assert len(set(orders)) == len(orders)


def mirrorings(loader: DeviceBatches) -> dict[int, tuple[bool, bool]]:
    """For each image whether it came left-right and top-bottom mirrored; fails if neither fits."""
    seen = {}
    for images, numbers in loader:
        for image, number in zip(images, numbers, strict=True):
            plain = normalised(number[None])[0].float()
            for x in (False, True):
                for y in (False, True):
                    axes = [axis for axis, wanted in ((2, x), (1, y)) if wanted]
                    if torch.allclose(image, plain.flip(axes), atol=1e-5):
                        seen[int(number)] = (x, y)
    return seen


def test_mirroring() -> None:
    loader = batches(augment=True)
    seen = [mirrorings(loader)]
    assert seen[0] == mirrorings(batches(augment=True, batch_size=9))
    for epoch in range(1, 12):
        loader.set_epoch(epoch)
        seen.append(mirrorings(loader))
    assert all(len(epoch) == 23 for epoch in seen)
    flags = np.array([[epoch[i] for i in range(23)] for epoch in seen])  # [12, 23, 2]
    assert np.all(np.abs(flags.mean(axis=(0, 1)) - 0.5) < 0.1)
    assert abs(np.mean(flags[..., 0] == flags[..., 1]) - 0.5) < 0.1  # independent of each other
    assert len({tuple(sorted(epoch.items())) for epoch in seen}) == len(seen)


def by_number(loader: DeviceBatches) -> dict[int, torch.Tensor]:
    """The first picture of each image that an epoch has."""
    found: dict[int, torch.Tensor] = {}
    for images, numbers in loader:
        for image, number in zip(images, numbers.tolist(), strict=True):
            found.setdefault(number, image)
    return found


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_turned_and_recoloured_by_seed_epoch_and_image_alone(layout: str) -> None:
    def pictures(epoch: int, **changes: Any) -> dict[int, torch.Tensor]:
        loader = batches(**{**EVERYTHING, "layout": layout, **changes})
        loader.set_epoch(epoch)
        return by_number(loader)

    first = pictures(2)
    for same in (
        pictures(2, batch_size=7),
        pictures(2, batch_size=23, shuffle=False),
        pictures(2, indices=[*range(23), 3, 3, 9]),
        pictures(2, indices=np.arange(23)[::-1], drop_last=True, batch_size=1),
    ):
        assert all(torch.equal(same[number], image) for number, image in first.items())
    for other in (pictures(3), pictures(2, seed=1)):
        assert sum(torch.equal(other[number], image) for number, image in first.items()) < 3


def test_an_image_that_comes_again_is_changed_anew() -> None:
    loader = batches(indices=[4] * 64, batch_size=64, **EVERYTHING)
    ((images, _),) = loader
    assert len(images.flatten(1).unique(dim=0)) == 64


def test_colour_jitter_is_one_gain_and_one_shift_a_colour_within_its_bounds() -> None:
    plain = batches(shuffle=False, batch_size=23)
    jittered = batches(shuffle=False, batch_size=23, color_jitter=0.2)
    ((before, _),), ((after, _),) = plain, jittered
    centred, recoloured = (x - x.mean((2, 3), keepdim=True) for x in (before, after))
    gain = recoloured.flatten(1).norm(dim=1) / centred.flatten(1).norm(dim=1)
    assert gain.min() >= 0.8 and gain.max() <= 1.2 and gain.std() > 0.05
    torch.testing.assert_close(
        recoloured, centred * gain[:, None, None, None], atol=1e-5, rtol=1e-4
    )
    shift = (after - before).mean((2, 3))
    assert shift.abs().max() <= 0.3 and shift.std() > 0.05
    assert (shift - shift.mean(1, keepdim=True)).abs().max() <= 0.2


def test_augmentation_leaves_the_dataset_alone() -> None:
    before = IMAGES.clone()
    list(batches(**EVERYTHING))
    assert torch.equal(IMAGES, before)


def test_images_on_the_device_are_shared() -> None:
    assert batches().images.data_ptr() == IMAGES.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES.float()}, r"give uint8 \[N, H, W, 3\]"),
        ({"images": IMAGES[..., :2]}, r"give uint8 \[N, H, W, 3\]"),
        ({"labels": NUMBERS[:-1]}, r"give int64 \[23\]"),
        ({"labels": NUMBERS.float()}, r"give int64 \[23\]"),
        ({"indices": []}, r"give at least one, integer \[M\]"),
        ({"indices": [[0]]}, r"give at least one, integer \[M\]"),
        ({"indices": [0.5]}, r"give at least one, integer \[M\]"),
        ({"indices": [0, 23]}, "indices reach from 0 to 23; there are images 0 to 22"),
        ({"indices": [-1, 3]}, "indices reach from -1 to 3; there are images 0 to 22"),
        ({"batch_size": 0}, "batch size is 0; choose 1 or more"),
        ({"batch_size": 24, "drop_last": True}, "23 images make no full batch of 24"),
        ({"std": (0.1, 0.0, 0.1)}, "std above 0"),
        ({"mean": (0.1, 0.1)}, "give three numbers each"),
        ({"dtype": torch.int32}, "dtype is torch.int32; choose float32, float64, bfloat16 or"),
        ({"dtype": torch.float16}, "on a GPU, float16"),
        ({"layout": "NHWC"}, "layout is 'NHWC'; choose one of contiguous, channels_last"),
        ({"images": IMAGES[:, :4], "rotate": True}, "images are 4x8; to be turned they must be"),
        ({"color_jitter": 1.0}, "color jitter is 1.0; choose 0 or more, below 1"),
        (
            {"color_jitter": 0.1, "dtype": torch.uint8},
            "color jitter is 0.1, which bytes don't take",
        ),
        ({"seed": -1}, "seed is -1; choose 0 or more"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SkinfastError, match=message):
        batches(**change)
