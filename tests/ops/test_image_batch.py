"""image_batch, held against the same in pure PyTorch and Philox in Python."""

from typing import NamedTuple

import pytest
import torch

from skinfast.environment import _host
from skinfast.ops import image_batch
from skinfast.ops.image_batch import mean_bytes
from skinfast.testing import LOW_PRECISION_FACTOR, devices, dtypes

LAYOUTS = ("contiguous", "channels_last")
# (batch, height, width): more than one run of pixels, full vectors, tails, one.
SIZES = [(70, 2, 70), (64, 4, 64), (33, 7, 5), (8, 3, 16), (3, 5, 1), (1, 1, 1), (1, 6, 67)]
SQUARES = [(64, 6, 6), (23, 16, 16), (9, 1, 1), (5, 70, 70), (16, 64, 64)]
EMPTY = [(0, 4, 4), (3, 0, 0), (3, 4, 0)]
EVERYTHING = {"mirror": True, "rotate": True, "color_jitter": 0.2, "seed": 2**40 + 3}

# --- Philox4x32-10: lines of Random123's kat_vectors ----------------------------------------------

KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


def philox(counter, key):
    """The four words of a counter, in Python's integers."""
    x, keys, mask = list(counter), [key & 0xFFFFFFFF, key >> 32], 0xFFFFFFFF
    for _ in range(10):
        first, second = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [
            (second >> 32) ^ x[1] ^ keys[0],
            second & mask,
            (first >> 32) ^ x[3] ^ keys[1],
            first & mask,
        ]
        keys = [(keys[0] + 0x9E3779B9) & mask, (keys[1] + 0xBB67AE85) & mask]
    return x


@pytest.mark.parametrize("function", [philox, *([_host.philox] if _host else [])])
@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_philox_gives_the_published_answers(function, line):
    words = [int(word, 16) for word in line.split()]
    assert function(words[:4], words[4] + (words[5] << 32)) == words[6:]


# --- the op ---------------------------------------------------------------------------------------


class Call(NamedTuple):
    """The tensors of a call."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor


def arguments(size, device="cpu", seed=0):
    """A call whose batch has some images more than once."""
    batch, height, width = size
    generator = torch.Generator().manual_seed(seed)

    def integers(end, shape, dtype):
        return torch.randint(end, shape, dtype=dtype, generator=generator).to(device)

    images = integers(256, (11, height, width, 3), torch.uint8)
    labels = torch.arange(11, device=device) * 10
    scale, shift = torch.tensor([[0.028, 0.026, 0.023], [-5.4, -3.7, -3.4]], device=device)
    return Call(images, labels, integers(11, (batch,), torch.int64), scale, shift)


def changed(image, words, scale, shift, mirror, rotate, jitter):
    """One image, float64 [3, H, W], from its eight random words."""
    if mirror:
        image = image.flip([axis for axis in (0, 1) if words[0] & (2, 1)[axis]])
    if rotate:
        image = torch.rot90(image, words[0] >> 2 & 3, (0, 1))
    pixels = image.double() * scale + shift
    u = [2 * (word >> 8) / 2**24 - 1 for word in words]
    mean = pixels.mean((0, 1)) if pixels.numel() else torch.zeros(3)
    tint = torch.tensor(u[5:8], dtype=torch.float64) / 2
    pixels = mean + (pixels - mean) * (1 + jitter * u[1]) + jitter * (u[4] + tint)
    return pixels.permute(2, 0, 1)


def in_pytorch(call, seed=0, mirror=False, rotate=False, color_jitter=0.0, epoch=0, draws=None):
    """The same, image by image, in float64."""
    images, labels, indices, scale, shift = (tensor.cpu() for tensor in call)
    draws = indices if draws is None else draws
    batch = []
    for index, draw in zip(indices.tolist(), draws.tolist(), strict=True):
        low, high = draw & 0xFFFFFFFF, draw >> 32
        words = [w for block in (0, 1) for w in philox((low, high, epoch, block), seed)]
        settings = (scale.double(), shift.double(), mirror, rotate, color_jitter)
        batch.append(changed(images[index], words, *settings))
    shape = (0, 3, *images.shape[1:3])
    return torch.stack(batch) if batch else torch.zeros(shape).double(), labels[indices]


def assert_stored(images, layout):
    order = {"contiguous": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1)}
    assert images.permute(order[layout]).is_contiguous()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("size", SIZES + EMPTY)
def test_equals_pure_pytorch_in_every_layout(device, dtype, mirror, size):
    call = arguments(size, device)
    expected, labels = in_pytorch(call, mirror=mirror)
    for layout in LAYOUTS:
        actual, batch_labels = image_batch(*call, mirror=mirror, layout=layout, dtype=dtype)
        torch.testing.assert_close(actual.cpu(), expected.to(dtype), rtol=1e-5, atol=2e-6)
        assert_stored(actual, layout)
        assert torch.equal(batch_labels.cpu(), labels)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SQUARES + EMPTY[:2])
def test_every_augmentation_is_what_philox_says(device, layout, size):
    call = arguments(size, device)
    means = mean_bytes(call.images)
    clock = torch.tensor([7, 0], device=device)
    for settings in (
        EVERYTHING,
        {"rotate": True, "seed": 5},
        {"mirror": True, "rotate": True},
        {"color_jitter": 0.5, "seed": 2**62},
    ):
        expected, _ = in_pytorch(call, epoch=7, **settings)
        for dtype in (torch.float32, torch.float64):
            actual, _ = image_batch(
                *call, clock=clock, means=means, layout=layout, dtype=dtype, **settings
            )
            # The scale of a float64 batch was rounded to float32 like any other's.
            tolerance = {torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
            torch.testing.assert_close(
                actual.cpu(), expected.to(dtype), rtol=tolerance, atol=tolerance
            )
            assert_stored(actual, layout)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES + SQUARES + EMPTY)
def test_bytes_are_those_that_are_normalised(device, layout, size):
    call = arguments(size, device)
    one, zero = torch.ones(3, device=device), torch.zeros(3, device=device)
    changes = {"mirror": True, "rotate": size[1] == size[2], "seed": 3, "layout": layout}
    actual, labels = image_batch(*call, **changes, dtype=torch.uint8)
    whole = call._replace(scale=one, shift=zero)
    expected, expected_labels = image_batch(*whole, **changes)
    assert actual.dtype == torch.uint8
    assert torch.equal(actual, expected.byte()) and torch.equal(labels, expected_labels)
    assert_stored(actual, layout)
    normalised = actual * call.scale.view(3, 1, 1) + call.shift.view(3, 1, 1)
    torch.testing.assert_close(normalised, image_batch(*call, **changes)[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("device", devices())
def test_every_view_comes_up_about_equally_often(device):
    images = torch.arange(48, dtype=torch.uint8, device=device).view(1, 4, 4, 3)
    indices = torch.zeros(4000, dtype=torch.int64, device=device)
    one, zero = torch.ones(3, device=device), torch.zeros(3, device=device)
    batch, _ = image_batch(
        images, indices[:1], indices, one, zero,
        draws=torch.arange(4000, device=device), mirror=True, rotate=True,
    )  # fmt: skip
    views, counts = batch.flatten(1).unique(dim=0, return_counts=True)
    assert len(views) == 8
    assert (counts - 500).abs().max() < 100  # five standard deviations


@pytest.mark.parametrize("device", devices())
def test_what_an_image_becomes_depends_on_seed_epoch_and_draw_alone(device):
    call = arguments((40, 8, 8), device)
    draws = torch.arange(40, device=device) + 2**33
    means = mean_bytes(call.images)

    def batch(epoch=3, first=0, size=40, draws=draws, **settings):
        clock = torch.tensor([epoch, first], device=device)
        settings = {**EVERYTHING, **settings}
        return image_batch(
            *call, clock=clock, batch_size=size, draws=draws, means=means, **settings
        )[0]

    whole = batch()
    for size in (1, 7, 40):
        parts = [batch(first=first, size=size) for first in range(0, 40 - size + 1, size)]
        joined = torch.cat(parts)
        assert torch.equal(joined, whole[: len(joined)])
    for other in (batch(epoch=4), batch(seed=4), batch(draws=draws - 2**33), batch(draws=None)):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9
    # What is switched off leaves the others' draws as they were.
    turned, mirrored = batch(color_jitter=0.0), batch(color_jitter=0.0, rotate=False)
    colours = [(x.mean((2, 3)), x.flatten(2).std(2)) for x in (batch(rotate=False), whole)]
    for ours, theirs in zip(*colours, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert any(not torch.equal(a, b) for a, b in zip(turned, mirrored, strict=True))
    for a, b in zip(turned, mirrored, strict=True):
        assert any(torch.equal(a, torch.rot90(b, k, (1, 2))) for k in range(4))


@pytest.mark.skipif("cuda" not in devices(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cpu_and_gpu_make_the_same_bits(layout, dtype):
    results = []
    for device in ("cpu", "cuda"):
        call = arguments((64, 33, 33), device)
        means = mean_bytes(call.images)
        batch, labels = image_batch(*call, means=means, layout=layout, dtype=dtype, **EVERYTHING)
        results.append((means.cpu(), batch.cpu(), labels.cpu()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_low_precision_is_as_exact_as_pytorch(device, dtype, size):
    if dtype not in dtypes(device):
        pytest.skip(f"no {dtype} on the {device}")
    call = arguments(size, device)
    exact = in_pytorch(call, mirror=True)[0].to(device)
    theirs = (exact.to(dtype).double() - exact).abs().max()
    for layout in LAYOUTS:
        actual, _ = image_batch(*call, mirror=True, layout=layout, dtype=dtype)
        assert actual.dtype == dtype
        assert (actual.double() - exact).abs().max() <= LOW_PRECISION_FACTOR * theirs


@pytest.mark.parametrize("device", devices())
def test_part_of_a_dataset_and_strided_arguments(device):
    images, labels, indices, scale, shift = arguments((9, 5, 5), device)
    indices = indices % 10
    expected, expected_labels = image_batch(
        images[1:], labels[1:], indices, scale, shift, means=mean_bytes(images[1:]), **EVERYTHING
    )

    def strided(tensor):
        return torch.stack([tensor, tensor], 1).flatten(0, 1)[1::2]

    spread = [strided(tensor) for tensor in (labels[1:], indices, scale, shift)]
    actual, actual_labels = image_batch(
        images[1:],
        *spread,
        draws=strided(indices),
        clock=strided(torch.zeros(2, dtype=torch.int64, device=device)),
        means=strided(mean_bytes(images[1:])),
        **EVERYTHING,
    )
    assert torch.equal(actual, expected)
    assert torch.equal(actual_labels, expected_labels)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_and_any_number_of_threads_are_equal_to_the_bit(device, layout, dtype):
    call = arguments((64, 67, 67), device)
    means = mean_bytes(call.images)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(
                image_batch(*call, means=means, layout=layout, dtype=dtype, **EVERYTHING)[0]
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(6, 4, 4), (1, 3, 3), (5, 1, 1), (0, 4, 4), (3, 4, 0)])
def test_keeps_the_dispatchers_contract(device, layout, size):
    images, labels, indices, scale, shift = arguments(size, device)
    clock = torch.zeros(2, dtype=torch.int64, device=device)
    for means in (None, mean_bytes(images)):
        torch.library.opcheck(
            torch.ops.skinfast.image_batch.default,
            (images, labels, indices, indices, clock, len(indices), scale, shift, means, 3, True,
             size[1] == size[2], 0.0 if means is None else 0.1, layout, torch.bfloat16),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize("index", [-1, 11])
def test_an_index_out_of_range_is_refused_on_the_cpu(index):
    call = arguments((5, 2, 2))
    call.indices[3] = index
    message = rf"^image_batch: indices\[3\] has {index}; it needs at least 0 and less than 11"
    with pytest.raises(RuntimeError, match=message):
        image_batch(*call)


@pytest.mark.parametrize("first", [-1, 3])
def test_a_place_out_of_range_is_refused_on_the_cpu(first):
    message = rf"^image_batch: clock\[1\] has {first}; for a batch of 3 of 5 it needs at least 0"
    with pytest.raises(RuntimeError, match=message):
        image_batch(*arguments((5, 2, 2)), clock=torch.tensor([0, first]), batch_size=3)


@pytest.mark.skipif("cuda" not in devices(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_out_of_range_is_nan_on_a_gpu(layout):
    call = arguments((5, 2, 2), "cuda")
    expected, expected_labels = image_batch(*call)
    call.indices[1], call.indices[3] = -1, 11
    clock = torch.tensor([0, 1], device="cuda")
    actual, labels = image_batch(*call, clock=clock, layout=layout)
    for row, there in enumerate((False, True, False, True, False)):  # the last is beyond the end
        if there:
            assert torch.equal(actual[row], expected[row + 1])
            assert labels[row] == expected_labels[row + 1]
        else:
            assert actual[row].isnan().all() and labels[row] == 0


IMAGES, LABELS, INDICES, SCALE, SHIFT = arguments((5, 4, 6))
CLOCK = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES.int()}, "images has dtype int32; it needs uint8"),
        ({"images": IMAGES[0]}, r"images has shape \[4, 6, 3\]; it needs \[N, H, W, 3\]"),
        ({"images": IMAGES[..., :2]}, r"images has shape \[11, 4, 6, 2\]; it needs"),
        ({"images": IMAGES[:, :, ::2]}, "images has gaps or another order in memory; it needs to"),
        ({"labels": LABELS.int()}, "labels has dtype int32; it needs int64"),
        ({"labels": LABELS[1:]}, r"labels has shape \[10\]; it needs \[11\]"),
        ({"indices": INDICES.int()}, "indices has dtype int32; it needs int64"),
        ({"indices": INDICES[None]}, r"indices has shape \[1, 5\]; it needs 1 dimensions \[M\]"),
        ({"draws": INDICES.int()}, "draws has dtype int32; it needs int64"),
        ({"draws": INDICES[1:]}, r"draws has shape \[4\]; it needs \[5\]"),
        ({"clock": CLOCK.int()}, "clock has dtype int32; it needs int64"),
        ({"clock": CLOCK[:1]}, r"clock has shape \[1\]; it needs \[2\]"),
        ({"batch_size": 6}, "batch_size is 6; it needs at least 0 and at most 5, the length of"),
        ({"batch_size": -1}, "batch_size is -1; it needs at least 0"),
        ({"scale": SCALE.double()}, "scale has dtype float64; it needs float32"),
        ({"scale": SCALE[:1]}, r"scale has shape \[1\]; it needs \[3\]"),
        ({"shift": SHIFT.half()}, "shift has dtype float16; it needs float32"),
        ({"shift": SHIFT[:2]}, r"shift has shape \[2\]; it needs \[3\]"),
        ({"rotate": True}, r"images has shape \[11, 4, 6, 3\]; to be turned an image needs to be"),
        ({"color_jitter": -0.1}, "color_jitter has the value -0.1; it needs one of at least 0"),
        ({"color_jitter": 0.1}, "color_jitter needs means"),
        ({"means": mean_bytes(IMAGES)[:5]}, r"means has shape \[5, 3\]; it needs \[11, 3\]"),
        ({"layout": "NHWC"}, "layout is 'NHWC'; it needs 'contiguous' or 'channels_last'"),
        ({"dtype": torch.int32}, "the result has dtype int32; on the CPU it needs float32"),
        ({"dtype": torch.float16}, "the result has dtype float16; on the CPU it needs float32"),
        (
            {"dtype": torch.uint8, "color_jitter": 0.1, "means": mean_bytes(IMAGES)},
            "color_jitter has the value 0.1 and the result dtype uint8; bytes keep their colours",
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    with pytest.raises(RuntimeError, match=f"^image_batch: {message}"):
        image_batch(**(arguments((5, 4, 6))._asdict() | change))


@pytest.mark.skipif("cuda" not in devices(), reason="needs a second device")
@pytest.mark.parametrize("name", ["labels", "indices", "draws", "clock", "scale", "shift", "means"])
def test_another_device_is_refused_by_name(name):
    call = arguments((5, 4, 6), "cuda")._asdict()
    call |= {"draws": call["indices"], "clock": CLOCK.cuda(), "means": mean_bytes(call["images"])}
    call[name] = call[name].cpu()
    with pytest.raises(RuntimeError, match=f"{name} and images are on different devices"):
        image_batch(**call)
