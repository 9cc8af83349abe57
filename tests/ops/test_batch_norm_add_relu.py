"""batch_norm_add_relu: the residual; tests/ops/test_batch_norm_relu.py holds what it shares."""

import pytest
import torch

from skinfast.ops.batch_norm_add_relu import batch_norm_add_relu


def test_residual_is_added_before_the_relu_and_takes_the_masked_gradient():
    x = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    residual = torch.tensor([[-2.0], [2.0], [0.0]], requires_grad=True)
    output = batch_norm_add_relu(x, residual, torch.zeros(1), torch.ones(1), eps=0.0)
    assert output.flatten().tolist() == [0.0, 1.0, 0.0]
    output.backward(torch.tensor([[3.0], [5.0], [7.0]]))
    assert residual.grad.flatten().tolist() == [0.0, 5.0, 0.0] == x.grad.flatten().tolist()


def test_autocast_brings_input_and_residual_to_the_wider_dtype():
    x, residual = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    statistics = torch.zeros(3), torch.ones(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for one, other in [(x, residual.bfloat16()), (x.bfloat16(), residual)]:
            assert batch_norm_add_relu(one, other, *statistics).dtype == torch.float32
        both = batch_norm_add_relu(x.bfloat16(), residual.bfloat16(), *statistics)
    assert both.dtype == torch.bfloat16


def test_residual_in_another_layout_gives_the_same():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(2, 3, 4, 5)
    statistics = torch.zeros(3), torch.ones(3)
    output = batch_norm_add_relu(x, residual, *statistics)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(output, batch_norm_add_relu(x.contiguous(), residual, *statistics))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 520, 2, 2), (150, 8, 3, 1), (2, 3, 20, 17)])
def test_two_gradients_of_the_output_are_added_as_a_tensor_would_be(shape, layout, dtype):
    def random() -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype, memory_format=layout)

    torch.manual_seed(0)
    x, residual, one, other = random(), random(), random(), random()
    _, *kept = torch.ops.skinfast.batch_norm_add_relu(
        x, residual, None, None, None, None, True, 1e-5
    )
    backward = torch.ops.skinfast.batch_norm_add_relu_backward
    found = backward(one, x, *kept, None, True, 1e-5, other)
    expected = backward(one + other, x, *kept, None, True, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.ones(3), r"other_grad_output has shape \[3\]; it needs \[2, 3\]"),
        (torch.ones(2, 3).double(), "other_grad_output has dtype float64 and x has float32"),
    ],
)
def test_bad_other_gradient_is_refused_by_name(other, message):
    ones, statistics = torch.ones(2, 3), (torch.ones(3), torch.ones(3))
    with pytest.raises(RuntimeError, match=f"^batch_norm_add_relu_backward: {message}"):
        torch.ops.skinfast.batch_norm_add_relu_backward(
            ones, ones, torch.ones(1).byte(), *statistics, None, True, 1e-5, other
        )


def test_gradient_without_a_mask_is_refused():
    ones, statistics = torch.ones(2, 3), (torch.ones(3), torch.ones(3))
    with pytest.raises(RuntimeError, match=r"^batch_norm_add_relu_backward: mask is empty"):
        torch.ops.skinfast.batch_norm_add_relu_backward(
            ones, ones, torch.ones(0).byte(), *statistics, None, True, 1e-5
        )


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (torch.ones(3), r"residual has shape \[3\]; it needs \[2, 3\]"),
        (torch.ones(2, 3).double(), "residual has dtype float64 and x has float32"),
    ],
)
def test_bad_residual_is_refused_by_name(residual, message):
    with pytest.raises(RuntimeError, match=f"^batch_norm_add_relu: {message}"):
        batch_norm_add_relu(torch.ones(2, 3), residual, torch.zeros(3), torch.ones(3))
