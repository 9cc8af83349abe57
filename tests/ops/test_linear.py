"""linear: sizes around its own kernels' limit, stored in any way, bad input."""

import pytest
import torch

from skinfast.ops.linear import linear, reference
from skinfast.testing import devices

ONES = torch.ones


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(64, 256, 128), (64, 257, 128), (5, 3, 17), (6, 33, 64), (7, 1, 16), (2, 31, 49)],
)
def test_equals_pure_pytorch_small_and_large(device, dtype, rows, inputs, outputs):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, feed = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in [(rows, inputs), (outputs, inputs), (outputs,), (rows, outputs)]
    )
    values = {}
    for function in (linear, reference):
        tensors = [t.detach().double() if function is reference else t for t in (x, weight, bias)]
        tensors = [t.requires_grad_() for t in tensors]
        result = function(*tensors)
        grads = torch.autograd.grad(result, tensors, feed.to(result))
        values[function] = [result.detach(), *grads]
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    for ours, exact in zip(values[linear], values[reference], strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), exact, rtol=rounding, atol=20 * rounding**2 + 1e-5
        )


def test_operands_are_taken_as_they_are_stored():
    x, weight = torch.randn(40, 16).t(), torch.randn(40, 10).t()
    bias = torch.randn(20)[::2]
    torch.testing.assert_close(linear(x, weight, bias), reference(x, weight, bias))
    three = torch.randn(3, 40, 2).transpose(1, 2)
    torch.testing.assert_close(linear(three, weight), reference(three, weight))


def test_result_does_not_depend_on_the_number_of_threads():
    x, weight = torch.randn(128, 120), torch.randn(130, 120)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((ONES(2, 3), ONES(4, 5)), r"input has shape \[2, 3\]; it needs \[\*, 5\]"),
        ((ONES(2, 3), ONES(3)), r"weight has shape \[3\]; it needs 2 dimensions"),
        ((ONES(2, 3), ONES(4, 3), ONES(5)), r"bias has shape \[5\]; it needs \[4\]"),
        ((ONES(2, 3), ONES(4, 3).double()), "weight has dtype float64 and input has float32"),
    ],
)
def test_bad_input_is_refused_by_name(args, message):
    with pytest.raises(RuntimeError, match=f"^linear: {message}"):
        linear(*args)
