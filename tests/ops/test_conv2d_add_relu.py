"""conv2d_add_relu: its two parts, the residual's gradient, layouts, bad input."""

import pytest
import torch

from skinfast.ops import add_relu, conv2d, conv2d_add_relu

ONES = torch.ones
LAST = torch.channels_last


def arguments(dtype=torch.float32, layout=LAST):
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 32, 3, 3), (40, 32, 3, 3), (40,), (6, 40, 3, 3)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [
        (t.contiguous(memory_format=layout) if t.dim() == 4 else t).requires_grad_()
        for t in tensors
    ]


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_conv2d_then_add_relu_to_the_bit_on_the_cpu(dtype, layout):
    x, weight, bias, residual = arguments(dtype, layout)
    output = conv2d_add_relu(x, weight, bias, residual, padding=1)
    assert torch.equal(output, add_relu(conv2d(x, weight, bias, padding=1), residual))
    assert output.is_contiguous(memory_format=layout)


def test_the_residual_gets_the_masked_gradient():
    x, weight, bias, residual = arguments()
    output = conv2d_add_relu(x, weight, bias, residual, padding=1)
    grad = torch.randn(output.shape)
    output.backward(grad)
    assert torch.equal(residual.grad, torch.where(output > 0, grad, 0))
    assert 0 < (residual.grad == 0).float().mean() < 1


def test_only_the_wanted_gradients_are_computed():
    x, weight, bias, residual = arguments()
    for tensor in (x, bias, residual):
        tensor.requires_grad_(False)
    conv2d_add_relu(x, weight, bias, residual, padding=1).sum().backward()
    assert weight.grad is not None
    assert x.grad is None and bias.grad is None and residual.grad is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (ONES(1, 3, 8, 8), ONES(10, 3, 3, 3), None, ONES(1, 10, 8, 8)),
            r"residual has shape \[1, 10, 8, 8\]; it needs \[1, 10, 6, 6\]",
        ),
        (
            (ONES(1, 3, 8, 8), ONES(10, 3, 3, 3), None, ONES(1, 10, 6, 6).double()),
            "residual has dtype float64 and input has float32",
        ),
        (
            (ONES(1, 4, 8, 8), ONES(10, 3, 3, 3), None, ONES(1, 10, 6, 6)),
            "input has 4 channels and needs",
        ),
        (
            (ONES(1, 3, 8, 8), ONES(10, 3, 3, 3), ONES(9), ONES(1, 10, 6, 6)),
            r"bias has shape \[9\]; it needs \[10\]",
        ),
    ],
)
def test_bad_input_is_refused_by_name(args, message):
    with pytest.raises(RuntimeError, match=f"^conv2d_add_relu: .*{message}"):
        conv2d_add_relu(*args)
