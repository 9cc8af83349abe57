"""linear_relu: transposed input, wanted gradients, bad input."""

import pytest
import torch

from skinfast.ops.linear_relu import linear_relu, reference

ONES = torch.ones


def test_transposed_input_is_taken_as_it_is():
    x = torch.randn(40, 16).t()
    weight = torch.randn(5, 40)
    torch.testing.assert_close(linear_relu(x, weight), reference(x, weight))


def test_only_wanted_gradients_are_computed():
    x, weight = torch.randn(4, 3), torch.randn(2, 3, requires_grad=True)
    linear_relu(x, weight, torch.randn(2)).sum().backward()
    assert weight.grad.shape == weight.shape and x.grad is None


def test_bias_gradient_of_many_rows_is_summed_accurately():
    x, weight = ONES(100_000, 1), ONES(1, 1)
    bias = torch.zeros(1, requires_grad=True)
    linear_relu(x, weight, bias).backward(torch.full((100_000, 1), 0.1))
    assert bias.grad.item() == pytest.approx(10_000, rel=1e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((ONES(2, 3), ONES(4, 5)), r"input has shape \[2, 3\]; it needs \[\*, 5\]"),
        ((ONES(2, 3), ONES(3)), r"weight has shape \[3\]; it needs 2 dimensions"),
        ((ONES(2, 3), ONES(4, 3), ONES(5)), r"bias has shape \[5\]; it needs \[4\]"),
        ((ONES(2, 3), ONES(4, 3).double()), "weight has dtype float64 and input has float32"),
        ((ONES(2, 3).half(), ONES(4, 3).half()), "input has dtype float16; on the CPU"),
    ],
)
def test_bad_input_is_refused_by_name(args, message):
    with pytest.raises(RuntimeError, match=f"^linear_relu: {message}"):
        linear_relu(*args)
