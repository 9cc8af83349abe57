"""conv2d_relu: layouts, padding by name, both ways of computing, threads, bad input."""

import pytest
import torch

from skinfast.ops._library import SampleInput
from skinfast.ops.conv2d_relu import conv2d_relu, reference
from skinfast.testing import outputs_and_gradients


def cnn_layer(images=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, 10, 9, 9), (10, 10, 5, 5), (10,)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("images", [1, 15, 16, 17, 31, 32, 33, 64])
def test_every_number_of_images_fills_its_vectors(images):
    x, weight, bias = cnn_layer(images)
    torch.testing.assert_close(
        conv2d_relu(x, weight, bias, padding="same"),
        reference(x, weight, bias, padding="same"),
        rtol=2e-5,
        atol=2e-5,
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 10, 16])
@pytest.mark.parametrize(("width", "padding"), [(16, 0), (18, 2)])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 4e-5), (torch.bfloat16, 2**-8)]
)
def test_every_number_of_channels(channels, width, padding, dtype, error):
    """Whole vectors hold more than the channels, and two of bfloat16 may be multiplied at once."""
    generator = torch.Generator().manual_seed(channels)
    shapes = [(17, channels, 9, width), (10, channels, 5, 5), (10,)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    ours = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    output = conv2d_relu(*ours, padding=padding)
    expected = reference(*exact, padding=padding)
    torch.testing.assert_close(output.double(), expected, rtol=error, atol=error)
    g = torch.randn(expected.shape, generator=generator).to(dtype)
    g = torch.where((output > 0) & (expected > 0), g, 0)  # rounding may close a ReLU
    output.backward(g)
    expected.backward(g.double())
    for a, b in zip(ours, exact, strict=True):
        scale = float(b.grad.abs().max())
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=error, atol=error / 4 * scale)


@pytest.mark.parametrize("channel", range(3))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_passes_nan_and_infinity_through_in_bfloat16(channel, value):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(s, generator=generator).bfloat16() for s in [(2, 3, 7, 7), (4, 3, 3, 3)]
    )
    x[1, channel, 2, 4] = value
    output = conv2d_relu(x, weight, None, padding=1)
    expected = reference(x.float(), weight.float(), None, padding=1)  # PyTorch's bfloat16 adds NaNs
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isinf(), expected.isinf())


def test_result_does_not_depend_on_the_number_of_threads():
    sample = SampleInput("", tuple(cnn_layer(40)), {"padding": 2})
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(conv2d_relu, sample))
    finally:
        torch.set_num_threads(before)
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]) and torch.equal(value, results[2][key]), key


def test_only_wanted_gradients_are_computed():
    x, weight, bias = cnn_layer()
    frozen = conv2d_relu(x.detach(), weight, bias)
    assert torch.autograd.grad(frozen.sum(), [weight, bias])[0].shape == weight.shape
    x_only = conv2d_relu(x, weight.detach(), None)
    assert torch.autograd.grad(x_only.sum(), x)[0].shape == x.shape


def test_weight_gradient_takes_the_layout_of_the_weight():
    x, weight, bias = cnn_layer()
    last = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    conv2d_relu(x, last, bias).sum().backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)


ONES = torch.ones


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((ONES(3, 8, 8), ONES(10, 3, 3, 3)), {}, r"input has shape \[3, 8, 8\]; it needs 4 dim"),
        ((ONES(1, 3, 8, 8), ONES(10, 3, 3)), {}, r"weight has shape \[10, 3, 3\]; it needs 4 dim"),
        ((ONES(1, 4, 8, 8), ONES(10, 3, 3, 3)), {}, "input has 4 channels and needs"),
        ((ONES(1, 4, 8, 8), ONES(9, 2, 3, 3)), {"groups": 2}, "they need to divide into 2 groups"),
        ((ONES(1, 4, 8, 8), ONES(9, 2, 3, 3)), {"groups": 0}, "groups is 0"),
        ((ONES(1, 3, 2, 8), ONES(10, 3, 3, 3)), {}, "it is smaller than the kernel"),
        ((ONES(1, 3, 8, 8), ONES(10, 3, 3, 3)), {"stride": 0}, "stride 0, "),
        ((ONES(1, 3, 8, 8), ONES(10, 3, 3, 3)), {"stride": (1, 2, 3)}, "one or two numbers"),
        ((ONES(1, 3, 8, 8), ONES(10, 3, 3, 3)), {"padding": "reflect"}, "padding is 'reflect'"),
        ((ONES(1, 3, 8, 8), ONES(10, 3, 2, 2)), {"padding": "same"}, "an odd kernel"),
        ((ONES(1, 3, 8, 8), ONES(10, 3, 3, 3).double()), {}, "weight has dtype float64"),
        ((ONES(1, 3, 8, 8).int(), ONES(10, 3, 3, 3).int()), {}, "input has dtype int32"),
        (
            (ONES(1, 3, 8, 8), ONES(10, 3, 3, 3), ONES(9)),
            {},
            r"bias has shape \[9\]; it needs \[10",
        ),
    ],
)
def test_bad_input_is_refused_by_name(args, kwargs, message):
    with pytest.raises(RuntimeError, match=f"^conv2d_relu: .*{message}"):
        conv2d_relu(*args, **kwargs)
