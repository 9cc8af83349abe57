"""global_average_pool2d: what is special to it; test_every_op.py holds what every op must do."""

import pytest
import torch
import torch.nn.functional as F

from skinfast.nn import GlobalAveragePool2d
from skinfast.ops import global_average_pool2d

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 7, 8, 16, 65, 130])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (7, 7), (4, 16), (13, 31)])
def test_every_tail_of_channels_and_of_pixels(layout, channels, size):
    x = torch.randn(3, channels, *size).contiguous(memory_format=layout).requires_grad_()
    y = global_average_pool2d(x)
    torch.testing.assert_close(y, F.adaptive_avg_pool2d(x, 1).flatten(1))
    weight = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, weight)
    assert torch.equal(grad, (weight / (size[0] * size[1]))[:, :, None, None].expand_as(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_of_many_pixels_keep_their_digits(layout):
    x = torch.rand(1, 20, 300, 211, generator=torch.Generator().manual_seed(0))
    exact = x.double().mean((2, 3))
    # One after the other they lose four digits of seven: 1e-5 to 2e-5 here.
    y = global_average_pool2d(x.contiguous(memory_format=layout))
    assert ((y - exact) / exact).abs().max() < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sixteen_bits_are_added_in_float32(layout):
    """256 and a 1, which bfloat16 would lose at every addition, 99 times."""
    x = torch.ones(1, 33, 10, 10, dtype=torch.bfloat16)
    x[:, :, 0, 0] = 256
    x = x.contiguous(memory_format=layout)
    assert torch.equal(global_average_pool2d(x), torch.full((1, 33), 3.55, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_takes_the_layout_of_the_input(layout):
    x = torch.randn(2, 10, 4, 3).contiguous(memory_format=layout).requires_grad_()
    (grad,) = torch.autograd.grad(global_average_pool2d(x).sum(), x)
    assert grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neither_threads_nor_the_batch_change_a_bit(layout):
    x = torch.randn(9, 331, 7, 9).contiguous(memory_format=layout)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(global_average_pool2d(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for n in range(len(x)):
        assert torch.equal(global_average_pool2d(x[n : n + 1])[0], results[0][n])


@pytest.mark.parametrize("backend", ["skinfast", "torch"])
def test_module(backend):
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(GlobalAveragePool2d(backend=backend)(x), x.mean((2, 3)))


def test_compiles_with_a_batch_of_any_size():
    compiled = torch.compile(
        global_average_pool2d, backend="aot_eager", dynamic=True, fullgraph=True
    )
    for batch in (2, 3):
        x = torch.randn(batch, 3, 8, 9, requires_grad=True)
        (grad,) = torch.autograd.grad(compiled(x).sum(), x)
        assert torch.equal(grad, torch.full_like(x, 1 / 72))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 3), r"x has shape \[2, 3\]; it needs 4 dimensions \[N, C, H, W\]"),
        (torch.ones(1, 2, 3, 0), "x has 3 rows and 0 columns; it needs at least one pixel"),
        (torch.ones(1, 2, 3, 4).int(), "x has dtype int32; on the CPU it needs"),
        (torch.ones(1, 2, 3, 4).half(), "x has dtype float16; on the CPU it needs"),
    ],
)
def test_bad_input_is_refused_by_name(x, message):
    with pytest.raises(RuntimeError, match=f"^global_average_pool2d: {message}"):
        global_average_pool2d(x)


@pytest.mark.parametrize(
    ("grad_output", "size", "message"),
    [
        (torch.ones(1, 2).int(), [1, 2, 3, 3], "grad_output has dtype int32"),
        (torch.ones(1, 3), [1, 2, 3, 3], r"grad_output has shape \[1, 3\]; it needs \[1, 2\]"),
        (torch.ones(1, 2), [1, 2, 3], "input_size has 3 values; it needs 4"),
        (torch.ones(1, 2), [1, 2, 0, 3], "x has 0 rows and 3 columns; it needs at least one pixel"),
        (torch.ones(1, 2), [-1, 2, 3, 3], "input_size has -1 in dimension 0; it needs at least 0"),
    ],
)
def test_bad_input_of_the_gradient_is_refused_by_name(grad_output, size, message):
    with pytest.raises(RuntimeError, match=f"^global_average_pool2d_backward: {message}"):
        torch.ops.skinfast.global_average_pool2d_backward(grad_output, size, False)
