"""conv2d: which way is taken, the layouts of both, threads, bad input."""

import pytest
import torch

from skinfast.ops import conv2d

ONES = torch.ones
LAST = torch.channels_last


def small_map(images=6, channels=32, side=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, side, side, generator=generator).to(dtype, memory_format=LAST)
    weight = torch.randn(40, channels, 3, 3, generator=generator).to(dtype, memory_format=LAST)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("side", [1, 2])
def test_small_maps_are_matrix_products(side):
    x, weight = small_map(side=side)
    with torch.profiler.profile() as profile:
        conv2d(x, weight, padding=1).sum().backward()
    called = {event.key for event in profile.key_averages()}
    assert "aten::mm" in called and "aten::convolution" not in called


@pytest.mark.parametrize("side", [1, 2, 3])
def test_layouts_of_output_and_gradients(side):
    x, weight = small_map(side=side)
    output = conv2d(x, weight, padding=1)
    output.square().sum().backward()
    for tensor in (output, x.grad, weight.grad):
        assert tensor.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_stored_as_in_either_layout(dtype):
    """Maps of one pixel and kernels of one tap are; the padded output is not."""
    x = torch.randn(4, 32, 1, 1).to(dtype).requires_grad_()
    weight = torch.randn(32, 32, 1, 1).to(dtype).requires_grad_()
    found = conv2d(x, weight, padding=1)
    expected = torch.nn.functional.conv2d(x, weight, padding=1)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        [found, *torch.autograd.grad(found, (x, weight), grad)],
        [expected, *torch.autograd.grad(expected, (x, weight), grad)],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("images", "channels", "filters", "height", "width", "kernel"),
    [
        (32, 256, 64, 4, 4, 3),
        (32, 64, 64, 16, 16, 3),
        (17, 96, 288, 6, 4, 3),
        (33, 288, 32, 4, 4, 3),
        (32, 512, 64, 2, 2, 3),
        (32, 1024, 64, 4, 4, 1),
    ],
)
def test_float32_is_as_accurate_as_pytorch(images, channels, filters, height, width, kernel):
    """However it is computed: on tiles from parts of the numbers, by minimal filtering. MKL and
    oneDNN differ from each other by up to 2.2 times."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(shape, generator=generator).to(memory_format=LAST)
        for shape in [
            (images, channels, height, width),
            (filters, channels, kernel, kernel),
            (images, filters, height, width),
        ]
    )
    errors = []
    for function, dtype in [
        (conv2d, torch.float32),
        (torch.nn.functional.conv2d, torch.float32),
        (torch.nn.functional.conv2d, torch.float64),
    ]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        output = function(*inputs, padding=kernel // 2)
        errors.append([output, *torch.autograd.grad(output, inputs, grad.to(dtype))])
    for ours, pytorch, exact in zip(*errors, strict=True):
        assert (ours - exact).norm() <= 3 * (pytorch - exact).norm()


@pytest.mark.parametrize(
    ("images", "channels", "filters", "height", "width", "kernel", "stride"),
    [
        (64, 512, 64, 2, 2, 3, 1),  # sums of several parts, taps in the padding
        (33, 96, 288, 4, 4, 3, 1),  # more filters than are packed together, half a panel of rows
        (40, 64, 64, 9, 7, 3, 1),  # only the gradient of the weight in panels
        (36, 64, 96, 8, 8, 3, 2),
        (70, 64, 96, 8, 8, 1, 2),
        (16, 1056, 32, 4, 4, 3, 2),
        (40, 64, 64, 1, 1, 3, 1),
    ],
)
def test_bfloat16_is_as_accurate_as_pytorch(
    images, channels, filters, height, width, kernel, stride
):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator).to(torch.bfloat16, memory_format=LAST)
        for shape in [(images, channels, height, width), (filters, channels, kernel, kernel)]
    )
    errors, grad = [], None
    for function, dtype in [
        (conv2d, torch.bfloat16),
        (torch.nn.functional.conv2d, torch.bfloat16),
        (torch.nn.functional.conv2d, torch.float64),
    ]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight)]
        output = function(*inputs, stride=stride, padding=kernel // 2)
        if grad is None:
            grad = torch.randn(output.shape, generator=generator).to(x.dtype, memory_format=LAST)
        errors.append([output, *torch.autograd.grad(output, inputs, grad.to(dtype))])
    for ours, pytorch, exact in zip(*errors, strict=True):
        # Both round a sum in float32 once.
        assert (ours - exact).norm() <= 1.1 * (pytorch - exact).norm()


# What is wanted of a convolution: its output, the gradients of its input and of its weight.
@pytest.mark.parametrize("wanted", ["output", "input", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("side", "kernel", "stride"), [(8, 3, 1), (4, 3, 1), (2, 3, 1), (2, 1, 1), (8, 3, 2)]
)
def test_own_kernels_do_not_depend_on_the_number_of_threads(side, kernel, stride, dtype, wanted):
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(shape, generator=generator).to(dtype, memory_format=LAST)
        for shape in [
            (40, 64, side, side),
            (96, 64, kernel, kernel),
            (40, 96, side // stride, side // stride),
        ]
    )
    where = [stride] * 2, [kernel // 2] * 2, [1, 1], 1
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.profiler.profile() as profile:
                if wanted == "output":
                    results.append([torch.ops.skinfast.conv2d(x, weight, None, *where)])
                else:
                    which = wanted == "input", wanted == "weight", False
                    gradients = torch.ops.skinfast.conv2d_backward(grad, x, weight, *where, *which)
                    results.append(gradients[:2])
    finally:
        torch.set_num_threads(threads)
    pytorchs = {"aten::mm", "aten::convolution", "aten::convolution_backward"}
    if pytorchs & {event.key for event in profile.key_averages()}:
        pytest.skip("PyTorch computes it on this CPU")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_numbers_of_every_size_keep_their_digits():
    """The parts of a number are as far apart as its digits, whatever its exponent."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 30, (8, 32, 2, 2), generator=generator)
    x = (torch.randn(8, 32, 2, 2, generator=generator) * 2.0**exponents).to(memory_format=LAST)
    weight = torch.eye(32)[:, :, None, None].to(memory_format=LAST)
    torch.testing.assert_close(conv2d(x, weight), x, rtol=0, atol=0)


def test_nan_stays_where_it_is():
    x = torch.ones(40, 32, 2, 2).to(memory_format=LAST)
    x[3, 5] = float("nan")
    output = conv2d(x, torch.ones(32, 32, 1, 1))
    assert output[3].isnan().all() and output.isnan().sum() == output[3].numel()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_the_pixels_whose_kernel_meets_them(value):
    """And no others, though a tile of 2x2 outputs is computed from 4x4 pixels."""
    x = torch.ones(8, 32, 12, 10).to(memory_format=LAST)
    x[3, 5, 5, 4] = value
    found = conv2d(x, torch.ones(64, 32, 3, 3).to(memory_format=LAST), padding=1)
    met = torch.zeros(found.shape, dtype=torch.bool)
    met[3, :, 4:7, 3:6] = True
    assert torch.equal(~found.isfinite(), met)


def test_taps_that_meet_only_padding_get_a_gradient_of_zero():
    x, weight = small_map(side=1)
    conv2d(x, weight, padding=1).sum().backward()
    assert weight.grad[:, :, 1, 1].abs().min() > 0
    weight.grad[:, :, 1, 1] = 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_bias_is_added():
    x, weight = small_map()
    bias = torch.randn(40, requires_grad=True)
    expected = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(conv2d(x, weight, bias, padding=1), expected, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((ONES(3, 8, 8), ONES(10, 3, 3, 3)), {}, r"input has shape \[3, 8, 8\]; it needs 4 dim"),
        ((ONES(1, 4, 8, 8), ONES(10, 3, 3, 3)), {}, "input has 4 channels and needs"),
        ((ONES(1, 3, 2, 8), ONES(10, 3, 3, 3)), {}, "it is smaller than the kernel"),
        ((ONES(1, 3, 8, 8), ONES(10, 3, 3, 3)), {"stride": (1, 2, 3)}, "one or two numbers"),
        ((ONES(1, 3, 8, 8), ONES(10, 3, 3, 3)), {"padding": "reflect"}, "padding is 'reflect'"),
        ((ONES(1, 3, 8, 8), ONES(10, 3, 3, 3).double()), {}, "weight has dtype float64"),
        ((ONES(1, 0, 8, 8), ONES(10, 0, 3, 3)), {}, "needs at least one channel"),
        ((ONES(1, 3, 0, 8), ONES(10, 3, 1, 1)), {"padding": 2}, "and a map that is not empty"),
    ],
)
def test_bad_input_is_refused_by_name(args, kwargs, message):
    with pytest.raises(RuntimeError, match=f"^conv2d: .*{message}"):
        conv2d(*args, **kwargs)


def test_pairs_of_another_length_are_refused_by_the_op_itself():
    x, weight = small_map()
    with pytest.raises(RuntimeError, match="stride has 1 values; it needs 2"):
        torch.ops.skinfast.conv2d(x, weight, None, [1], [0, 0], [1, 1], 1)
