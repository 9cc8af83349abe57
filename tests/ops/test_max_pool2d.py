"""max_pool2d: what is special to it; tests/ops/test_every_op.py holds what every op must do."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from skinfast.ops.max_pool2d import max_pool2d

NAN, INFINITY = float("nan"), float("inf")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def _with_gradient(pool, x, *args, **kwargs):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = pool(x, *args, **kwargs)
    weight = torch.arange(1, y.numel() + 1, dtype=x.dtype).reshape(y.shape)
    (grad,) = torch.autograd.grad(y, x, weight)
    return y.detach(), grad


def _assert_as_torch(x, *args, **kwargs):
    actual = _with_gradient(max_pool2d, x, *args, **kwargs)
    expected = _with_gradient(F.max_pool2d, x, *args, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
@pytest.mark.parametrize("channels", [1, 10, 16, 33])
@pytest.mark.parametrize("size", [(8, 8), (9, 41), (13, 7), (24, 130)])
def test_tiling_windows_of_every_size_and_tail(layout, kernel, channels, size):
    x = torch.randn(2, channels, *size).contiguous(memory_format=layout)
    _assert_as_torch(x, kernel)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("dilation", [1, (2, 3)])
def test_every_window_that_torch_allows(layout, ceil_mode, dilation):
    x = torch.randint(-9, 9, (2, 5, 11, 38)).float().contiguous(memory_format=layout)
    for kernel, stride in itertools.product([1, 2, (3, 2), 5], [None, 1, 2, (3, 4)]):
        largest = kernel // 2 if isinstance(kernel, int) else tuple(k // 2 for k in kernel)
        for padding in {0, largest}:
            _assert_as_torch(x, kernel, stride, padding, dilation, ceil_mode)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [(2,), (3,), (3, 2, 1), (3, 1, 1)])
@pytest.mark.parametrize("value", [0.0, NAN, INFINITY, -INFINITY])
def test_of_equal_maxima_the_first_takes_the_gradient_and_of_nans_the_last(layout, window, value):
    x = torch.full((1, 3, 9, 9), value).contiguous(memory_format=layout)
    _assert_as_torch(x, *window)


def test_nan_is_the_maximum_wherever_it_stands():
    x = torch.randn(4, 16, 8, 8)
    x[torch.rand(x.shape) < 0.2] = NAN
    for layout in LAYOUTS:
        _assert_as_torch(x.contiguous(memory_format=layout), 2)
        _assert_as_torch(x.contiguous(memory_format=layout), 3, 2, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_window_that_dilation_carries_past_the_input_is_minus_infinity(layout):
    x = torch.randn(1, 2, 4, 4).contiguous(memory_format=layout).requires_grad_()
    y = max_pool2d(x, 2, padding=1, dilation=5)
    assert y.flatten().tolist() == [-INFINITY, -INFINITY]
    y.sum().backward()
    assert not x.grad.any()


def test_output_and_gradient_take_the_layout_of_x_even_for_maps_of_one_pixel():
    x = torch.randn(2, 10, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = max_pool2d(x, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [(2,), (3, 2, 1)])
def test_no_number_of_threads_changes_a_bit(layout, window):
    x = torch.randn(8, 10, 64, 65).contiguous(memory_format=layout)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_with_gradient(max_pool2d, x, *window))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_argmax_that_no_forward_pass_wrote_stays_inside_the_gradient():
    grad_output, argmax = torch.ones(1, 3, 2, 2), torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    for stride, padding in [(2, 0), (2, 1), (1, 0)]:
        size = 3 if stride == 1 else 4 - padding
        grad = torch.ops.skinfast.max_pool2d_backward(
            grad_output, argmax, [1, 3, size, size], *([n, n] for n in (2, stride, padding, 1)),
            False, False,
        )  # fmt: skip
        assert grad.isfinite().all()


def test_compiles_with_a_batch_of_any_size():
    compiled = torch.compile(max_pool2d, backend="aot_eager", dynamic=True, fullgraph=True)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 8, 9, requires_grad=True)
        (grad,) = torch.autograd.grad(compiled(x, 3, 2, 1).sum(), x)
        assert torch.equal(grad, torch.autograd.grad(F.max_pool2d(x, 3, 2, 1).sum(), x)[0])


X = torch.ones(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X.int(), 2), "x has dtype int32; on the CPU it needs"),
        ((X[0, 0], 2), r"x has shape \[4, 4\]; it needs 4 dimensions \[N, C, H, W\], or 3 without"),
        ((X[:, :0], 2), "x has size 0 in dimension 1; it needs at least 1"),
        ((X, 0), "kernel_size has 0; it needs at least 1"),
        ((X, (1, 2, 3)), "kernel_size has 3 values; it needs one, or one each for height and"),
        ((X, 16), "kernel_size has 256 positions; it needs at most 255"),
        ((X, 2, 0), "stride has 0; it needs at least 1"),
        ((X, 2, 2, -1), "padding has -1; it needs at least 0"),
        ((X, 3, 2, 2), "padding has 2 for a kernel of 3; it needs at most half the kernel"),
        ((X, 2, 2, 0, 0), "dilation has 0; it needs at least 1"),
        ((X, 5), "x has 4 rows or columns, 0 of padding included; a window needs 5"),
        ((X, 2, 2, 0, 1 << 29), "dilation has 536870912; it needs at least 1 and at most"),
    ],
)
def test_bad_input_is_refused_by_name(args, message):
    with pytest.raises(RuntimeError, match=f"^max_pool2d: {message}"):
        max_pool2d(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_output": torch.ones(1, 2, 2, 2).int()}, "grad_output has dtype int32"),
        (
            {"grad_output": torch.ones(1, 2, 3, 2)},
            r"grad_output has shape \[1, 2, 3, 2\]; it needs",
        ),
        ({"argmax": torch.ones(1, 2, 2, 2)}, "argmax has dtype float32; it needs uint8"),
        ({"argmax": torch.ones(1, 2, 2).byte()}, r"argmax has shape \[1, 2, 2\]; it needs"),
        ({"input_size": [2, 4, 4]}, "input_size has 3 values; it needs 4"),
        ({"input_size": [-1, 2, 4, 4]}, "input_size has -1 in dimension 0; it needs at least 0"),
    ],
)
def test_bad_input_of_the_gradient_is_refused_by_name(change, message):
    arguments = {
        "grad_output": torch.ones(1, 2, 2, 2),
        "argmax": torch.zeros(1, 2, 2, 2, dtype=torch.uint8),
        "input_size": [1, 2, 4, 4],
        "kernel_size": [2, 2],
        "stride": [2, 2],
        "padding": [0, 0],
        "dilation": [1, 1],
        "ceil_mode": False,
        "channels_last": False,
    }
    with pytest.raises(RuntimeError, match=f"^max_pool2d_backward: {message}"):
        torch.ops.skinfast.max_pool2d_backward(**(arguments | change))
