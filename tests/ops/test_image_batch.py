"""image_batch, held against the same in pure PyTorch."""

import pytest
import torch

from skinfast.ops import image_batch
from skinfast.testing import LOW_PRECISION_FACTOR, devices, dtypes

LAYOUTS = ("contiguous", "channels_last")
# (batch, height, width): more than one run of pixels and tile of images, full vectors, tails, one.
SIZES = [(70, 2, 70), (64, 4, 64), (33, 7, 5), (8, 3, 16), (3, 5, 1), (1, 1, 1), (1, 6, 67)]
EMPTY = [(0, 4, 4), (3, 0, 4), (3, 4, 0)]


def arguments(size, device="cpu", flipped=True, seed=0):
    """images, indices, scale, shift, flips; all flips occur, some images more than once."""
    batch, height, width = size
    generator = torch.Generator().manual_seed(seed)

    def integers(end, shape, dtype):
        return torch.randint(end, shape, dtype=dtype, generator=generator).to(device)

    images = integers(256, (11, height, width, 3), torch.uint8)
    scale, shift = torch.tensor([[0.028, 0.026, 0.023], [-5.4, -3.7, -3.4]], device=device)
    flips = integers(4, (batch,), torch.uint8) if flipped else None
    return images, integers(11, (batch,), torch.int64), scale, shift, flips


def mirrored(images, indices, flips):
    """The images of a batch, uint8 [B, H, W, 3]."""
    rows = []
    for i, index in enumerate(indices.tolist()):
        flip = 0 if flips is None else int(flips[i])
        rows.append(images[index].flip([axis for axis in (0, 1) if flip & (2, 1)[axis]]))
    return torch.stack(rows) if rows else images[:0]


def in_pytorch(images, indices, scale, shift, flips, dtype=torch.float32):
    """The same, one op after the other; float64 in float64 throughout."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    planes = mirrored(images, indices, flips).permute(0, 3, 1, 2).to(wide)
    scale, shift = (v.to(wide).view(3, 1, 1) for v in (scale, shift))
    return torch.addcmul(shift, planes, scale).to(dtype)


def assert_stored(images, layout):
    order = {"contiguous": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1)}
    assert images.permute(order[layout]).is_contiguous()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("size", SIZES + EMPTY)
def test_equals_pure_pytorch_in_every_layout(device, dtype, flipped, size):
    call = arguments(size, device, flipped)
    expected = in_pytorch(*call, dtype)
    for layout in LAYOUTS:
        actual = image_batch(*call, layout=layout, dtype=dtype)
        torch.testing.assert_close(actual, expected)
        assert_stored(actual, layout)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_low_precision_is_as_exact_as_pytorch(device, dtype, size):
    if dtype not in dtypes(device):
        pytest.skip(f"no {dtype} on the {device}")
    call = arguments(size, device)
    exact = in_pytorch(*call, torch.float64)
    theirs = (in_pytorch(*call, dtype).double() - exact).abs().max()
    for layout in LAYOUTS:
        actual = image_batch(*call, layout=layout, dtype=dtype)
        assert actual.dtype == dtype
        assert (actual.double() - exact).abs().max() <= LOW_PRECISION_FACTOR * theirs


@pytest.mark.parametrize("device", devices())
def test_part_of_a_dataset_and_strided_arguments(device):
    images, indices, scale, shift, flips = arguments((9, 3, 5), device)
    expected = image_batch(images[1:], indices % 10, scale, shift, flips)

    def strided(tensor):
        return torch.stack([tensor, tensor], 1).flatten()[1::2]

    spread = [strided(tensor) for tensor in (indices % 10, scale, shift, flips)]
    assert torch.equal(image_batch(images[1:], *spread), expected)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_and_any_number_of_threads_are_equal_to_the_bit(device, layout, dtype):
    call = arguments((64, 33, 67), device)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(image_batch(*call, layout=layout, dtype=dtype))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(6, 4, 5), (1, 3, 4), (5, 1, 1), (0, 4, 4), (3, 4, 0)])
def test_keeps_the_dispatchers_contract(device, layout, size):
    for flipped in (False, True):
        torch.library.opcheck(
            torch.ops.skinfast.image_batch.default,
            (*arguments(size, device, flipped), layout, torch.bfloat16),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("index", [-1, 11])
def test_an_index_out_of_range_is_refused_on_the_cpu(index):
    images, indices, scale, shift, flips = arguments((5, 2, 2))
    indices[3] = index
    message = rf"^image_batch: indices\[3\] has {index}; it needs at least 0 and less than 11"
    with pytest.raises(RuntimeError, match=message):
        image_batch(images, indices, scale, shift, flips)


@pytest.mark.skipif("cuda" not in devices(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_index_out_of_range_makes_an_image_of_nan_on_a_gpu(layout):
    images, indices, scale, shift, flips = arguments((5, 2, 2), "cuda")
    expected = image_batch(images, indices, scale, shift, flips)
    expected[1], expected[3] = torch.nan, torch.nan
    indices[1], indices[3] = -1, 11
    actual = image_batch(images, indices, scale, shift, flips, layout)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


IMAGES, INDICES, SCALE, SHIFT, FLIPS = arguments((5, 4, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES.int()}, "images has dtype int32; it needs uint8"),
        ({"images": IMAGES[0]}, r"images has shape \[4, 6, 3\]; it needs \[N, H, W, 3\]"),
        ({"images": IMAGES[..., :2]}, r"images has shape \[11, 4, 6, 2\]; it needs"),
        ({"images": IMAGES[:, :, ::2]}, "images has gaps or another order in memory; it needs to"),
        ({"indices": INDICES.int()}, "indices has dtype int32; it needs int64"),
        ({"indices": INDICES[None]}, r"indices has shape \[1, 5\]; it needs 1 dimensions \[B\]"),
        ({"scale": SCALE.double()}, "scale has dtype float64; it needs float32"),
        ({"scale": SCALE[:1]}, r"scale has shape \[1\]; it needs \[3\]"),
        ({"shift": SHIFT.half()}, "shift has dtype float16; it needs float32"),
        ({"shift": SHIFT[:2]}, r"shift has shape \[2\]; it needs \[3\]"),
        ({"flips": FLIPS.bool()}, "flips has dtype bool; it needs uint8"),
        ({"flips": FLIPS[:4]}, r"flips has shape \[4\]; it needs \[5\]"),
        ({"layout": "NHWC"}, "layout is 'NHWC'; it needs 'contiguous' or 'channels_last'"),
        ({"dtype": torch.int32}, "the result has dtype int32; on the CPU it needs float32"),
        ({"dtype": torch.float16}, "the result has dtype float16; on the CPU it needs float32"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    call = {
        "images": IMAGES,
        "indices": INDICES,
        "scale": SCALE,
        "shift": SHIFT,
        "flips": FLIPS,
    }
    with pytest.raises(RuntimeError, match=f"^image_batch: {message}"):
        image_batch(**(call | change))


@pytest.mark.skipif("cuda" not in devices(), reason="needs a second device")
@pytest.mark.parametrize("name", ["indices", "scale", "shift", "flips"])
def test_another_device_is_refused_by_name(name):
    names = ("images", "indices", "scale", "shift", "flips")
    call = dict(zip(names, arguments((5, 4, 6), "cuda"), strict=True))
    call[name] = call[name].cpu()
    with pytest.raises(RuntimeError, match=f"{name} and images are on different devices"):
        image_batch(**call)
