"""conv2d_relu_max_pool2d: what tests/ops/test_every_op.py does not ask of every op."""

import pytest
import torch

from skinfast.ops import conv2d_relu_max_pool2d
from skinfast.ops.conv2d_relu_max_pool2d import reference


def _tensors(*, n=5, c=3, k=4, size=9, kernel=3):
    torch.manual_seed(0)
    x = torch.randn(n, c, size, size, requires_grad=True)
    weight = torch.randn(k, c, kernel, kernel, requires_grad=True)
    return x, weight, torch.randn(k, requires_grad=True)


def test_first_of_equal_maxima_gets_the_gradient():
    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    weight = torch.ones(1, 1, 1, 1)
    conv2d_relu_max_pool2d(x, weight, None, 0, 2).sum().backward()
    expected = torch.zeros(4, 4)
    expected[::2, ::2] = 1
    torch.testing.assert_close(x.grad[0, 0], expected, rtol=0, atol=0)


def test_nan_is_the_greatest_and_passes_its_gradient():
    x = torch.randn(2, 1, 6, 6)
    x[0, 0, 1, 1] = torch.nan
    weight = torch.ones(1, 1, 1, 1)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    output = conv2d_relu_max_pool2d(ours, weight, None, 0, 3)
    expected = reference(theirs, weight, None, 0, 3)
    torch.testing.assert_close(output, expected, equal_nan=True)
    output.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)


@pytest.mark.parametrize(("size", "passing"), [(5, 8), (6, 15)])  # an even and an odd number
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinity_where_nothing_passes_is_not_multiplied(dtype, size, passing):
    torch.manual_seed(0)
    x = -torch.rand(1, 3, size, size).to(dtype)
    weight = -torch.rand(1, 3, 3, 3).to(dtype)  # of the infinity it makes one that the ReLU stops
    gradients = []
    for value in (torch.inf, 9999.0):
        x[0, :, 0, 0] = value
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        output = conv2d_relu_max_pool2d(*inputs, None, 0, 1)
        assert output.count_nonzero() == passing
        gradients.append(torch.autograd.grad(output.sum(), inputs))
    for with_infinity, without in zip(*gradients, strict=True):
        assert torch.equal(with_infinity, without)


def test_pixels_that_fill_no_window_have_no_part():
    x, weight, bias = _tensors(size=9)  # 9x9 before pooling: the last row and column fill none
    output = conv2d_relu_max_pool2d(x, weight, bias, 1, 4)
    assert output.shape == (5, 4, 2, 2)
    output.sum().backward()
    expected = x.grad.clone()
    x.grad = None
    reference(x, weight, bias, 1, 4).sum().backward()
    torch.testing.assert_close(expected, x.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 64])
def test_equal_bits_for_any_number_of_threads(n):
    x, weight, bias = _tensors(n=n, c=10, k=10, size=12, kernel=5)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        output = conv2d_relu_max_pool2d(x, weight, bias, 2, 3)
        results.append([output, *torch.autograd.grad(output.square().sum(), (x, weight, bias))])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pool_size": 12}, "pool_size has 12 for a map of 9; it needs at least 1 and at most"),
        ({"pool_size": 0}, "pool_size has 0"),
        ({"pool_size": (1, 2, 3)}, "where one or two numbers fit"),
        ({"padding": -1}, "padding -1"),
        ({"padding": "full"}, "padding is 'full'"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    x, weight, bias = _tensors()
    with pytest.raises(RuntimeError, match=message):
        conv2d_relu_max_pool2d(x, weight, bias, **{"padding": 1, "pool_size": 2, **changed})


def test_window_of_too_many_pixels_is_refused():
    x, weight, bias = _tensors(size=20)
    with pytest.raises(RuntimeError, match="pool_size has 256 positions; it needs at most 255"):
        conv2d_relu_max_pool2d(x, weight, bias, 1, 16)


@pytest.mark.parametrize("name", ["grad_output", "output", "argmax"])
def test_backward_checks_what_it_is_given(name):
    x, weight, bias = (t.detach() for t in _tensors())
    output, argmax = torch.ops.skinfast.conv2d_relu_max_pool2d(x, weight, bias, [1, 1], [2, 2])
    given = {"grad_output": output, "output": output, "argmax": argmax}
    given[name] = given[name][1:]
    with pytest.raises(RuntimeError, match=f"{name} has shape"):
        torch.ops.skinfast.conv2d_relu_max_pool2d_backward(
            *given.values(), x, weight, [1, 1], [2, 2], True, True, True
        )
