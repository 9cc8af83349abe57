"""add_relu: what is special to it; tests/ops/test_every_op.py holds what every op must do."""

import pytest
import torch

from skinfast.ops import add_relu


def test_gradient_is_the_same_tensor_for_both_inputs_and_stops_at_zero():
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    residual = torch.tensor([0.5, 0.0, -1.0], requires_grad=True)
    add_relu(x, residual).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 1.0] == residual.grad.tolist()


def test_gradient_passes_where_the_output_is_nan():
    x = torch.tensor([float("nan"), 1.0], requires_grad=True)
    add_relu(x, torch.zeros(2)).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]


def test_output_takes_the_layout_of_x():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert add_relu(x, torch.randn(2, 3, 4, 5)).is_contiguous(memory_format=torch.channels_last)
    assert add_relu(torch.randn(2, 3, 4, 5), x).is_contiguous()


@pytest.mark.parametrize(
    ("x", "residual", "message"),
    [
        (torch.ones(2, 3), torch.ones(3), r"residual has shape \[3\]; it needs \[2, 3\]"),
        (torch.ones(2), torch.ones(2).double(), "residual has dtype float64 and x has float32"),
        (torch.ones(2).int(), torch.ones(2).int(), "x has dtype int32; on the CPU it needs"),
        (torch.ones(2).half(), torch.ones(2).half(), "x has dtype float16; on the CPU it needs"),
    ],
)
def test_bad_input_is_refused_by_name(x, residual, message):
    with pytest.raises(RuntimeError, match=f"^add_relu: {message}"):
        add_relu(x, residual)
