"""Tensors of more than 2^31 elements on a GPU: what lies past the range of 32 bits is computed.

Results are held against the same op on the last part alone. Each test takes 10 to 40 GB.
"""

import pytest
import torch

from skinfast.ops import (
    add_relu,
    batch_norm_relu,
    cross_entropy,
    global_average_pool2d,
    max_pool2d,
)
from skinfast.optim import Adam

# Of several workers one alone: together they would find the memory free, and none have it.
pytestmark = pytest.mark.xdist_group("large_tensors")
MANY = 2**31 + 8
GIB = 2**30


@pytest.fixture(autouse=True)
def room():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 45 * GIB:
        pytest.skip("needs 45 GiB of free memory on the GPU")
    yield
    torch.cuda.empty_cache()


def drawn(*shape):
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(generator=generator)


@pytest.mark.parametrize("start", [0, 1])
def test_add_relu(start):
    x, residual = (drawn(MANY)[start:].requires_grad_() for _ in range(2))
    output = add_relu(x, residual)
    (grad,) = torch.autograd.grad(output, x, output.detach())
    for part in (slice(0, 1000), slice(-1000, None)):
        assert torch.equal(output[part], add_relu(x[part], residual[part]))
        assert torch.equal(grad[part], output[part])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_max_pool2d(layout):
    x = drawn(1025, 8, 512, 512).contiguous(memory_format=layout).requires_grad_()
    assert x.numel() > 2**31
    output = max_pool2d(x, 3, 2, 1)
    (grad,) = torch.autograd.grad(output, x, output.detach())
    for image in (0, -1):
        alone = x.detach()[[image]].requires_grad_()
        expected = max_pool2d(alone, 3, 2, 1)
        assert torch.equal(output[image], expected[0])
        (of_image,) = torch.autograd.grad(expected, alone, expected.detach())
        assert torch.equal(grad[image], of_image[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2**17 + 1, 4096, 2, 2), (1025, 8, 512, 512)])
def test_global_average_pool2d(layout, size):
    x = drawn(*size).contiguous(memory_format=layout).requires_grad_()
    output = global_average_pool2d(x)
    (grad,) = torch.autograd.grad(output, x, output.detach())
    for image in (0, -1):
        alone = x.detach()[[image]].requires_grad_()
        expected = global_average_pool2d(alone)
        assert torch.equal(output[image], expected[0])
        (of_image,) = torch.autograd.grad(expected, alone, expected.detach())
        assert torch.equal(grad[image], of_image[0])


def test_cross_entropy():
    logits = drawn(MANY // 4, 4).requires_grad_()
    target = torch.arange(MANY // 4, device="cuda") % 4
    loss = cross_entropy(logits, target, reduction="sum")
    (grad,) = torch.autograd.grad(loss, logits)
    for rows in (slice(0, 1000), slice(-1000, None)):
        alone = logits.detach()[rows].requires_grad_()
        part = cross_entropy(alone, target[rows], reduction="sum")
        assert torch.equal(grad[rows], torch.autograd.grad(part, alone)[0])


def test_adam():
    large = drawn(MANY)
    grad = drawn(MANY)
    parts = [slice(0, 1000), slice(MANY - 1000, MANY)]
    small = [large[part].clone() for part in parts]
    large.grad = grad
    for tensor, part in zip(small, parts, strict=True):
        tensor.grad = grad[part].clone()
    Adam([large], lr=0.1).step()
    Adam(small, lr=0.1).step()
    for tensor, part in zip(small, parts, strict=True):
        assert torch.equal(large[part], tensor)


def test_batch_norm_refuses_what_it_could_not_count():
    x = drawn(MANY // 8, 8)
    statistics = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError, match=r"^batch_norm_relu: x has \d+ elements; .* fewer than"):
        batch_norm_relu(x, *statistics, training=True)
