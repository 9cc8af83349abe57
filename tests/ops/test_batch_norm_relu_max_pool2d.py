"""What is special to batch_norm_relu_max_pool2d; tests/ops/test_every_op.py holds the rest."""

import itertools

import pytest
import torch

from skinfast.ops.batch_norm_relu import batch_norm_relu
from skinfast.ops.batch_norm_relu_max_pool2d import batch_norm_relu_max_pool2d
from skinfast.ops.max_pool2d import max_pool2d
from skinfast.testing import in_layout

NAN, INFINITY = float("nan"), float("inf")
LAYOUTS = ("contiguous", "channels_last")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _composition(x, *args, training, **pool):
    return max_pool2d(batch_norm_relu(x, *args, training=training), **pool)


def _outputs_gradients_and_statistics(function, x, *, training=True, needs_grad_x=True, **pool):
    generator = torch.Generator().manual_seed(1)
    channels = x.shape[1]
    vectors = [torch.randn(channels, generator=generator).to(x.dtype) for _ in range(4)]
    running = vectors[0].clone(), vectors[1].abs() + 0.5
    parameters = [v.clone().requires_grad_() for v in vectors[2:]]
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs_grad_x)
    output = function(x, *running, *parameters, training=training, **pool)
    inputs = [x, *parameters] if needs_grad_x else parameters
    weight = torch.randn(output.shape, generator=generator).to(x.dtype)
    return output.detach(), *torch.autograd.grad(output, inputs, weight), *running


def _bits(tensor):
    """NaN with its payload, and the sign of a zero."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def _assert_equals_composition(x, **keywords):
    actual = _outputs_gradients_and_statistics(batch_norm_relu_max_pool2d, x, **keywords)
    expected = _outputs_gradients_and_statistics(_composition, x, **keywords)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(_bits(ours), _bits(theirs))
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
# Parts of every kind: many maps in one, one map in many, rows and columns that end within one;
# more channels than a tile has columns; planes that a tile holds several of.
@pytest.mark.parametrize(
    "shape",
    [(9, 64, 16, 16), (3, 16, 150, 70), (2, 600, 20, 21), (140, 6, 5, 5), (1, 3, 400, 200)],
)
def test_equals_batch_norm_relu_and_max_pool2d_to_the_bit(shape, training, dtype, layout):
    x = in_layout(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), layout)
    _assert_equals_composition(x, training=training, kernel_size=3, stride=2, padding=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("dilation", [1, (2, 3)])
def test_equals_them_for_every_window(layout, ceil_mode, dilation):
    x = in_layout(torch.randn(2, 20, 60, 61, generator=torch.Generator().manual_seed(0)), layout)
    for kernel, stride in itertools.product([1, 2, (3, 2), 5], [None, 1, 2, (3, 4)]):
        largest = kernel // 2 if isinstance(kernel, int) else tuple(k // 2 for k in kernel)
        for padding in {0, largest}:
            _assert_equals_composition(
                x, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation,
                ceil_mode=ceil_mode,
            )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("training", [True, False])
def test_equals_them_where_maxima_tie_and_nothing_is_a_number(layout, value, training):
    x = torch.randn(4, 16, 12, 12, generator=torch.Generator().manual_seed(0)).round()
    x[::2, ::3, ::2, 1::3] = value
    for pool in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}):
        _assert_equals_composition(in_layout(x, layout), training=training, **pool)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pixel_that_the_relu_stops_has_no_gradient(layout):
    x = in_layout(-torch.rand(2, 8, 8, 8), layout).requires_grad_()
    output = batch_norm_relu_max_pool2d(x, torch.zeros(8), torch.ones(8), kernel_size=2)
    assert not output.any()
    output.sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_gradient_of_x_the_others_stay_the_same(layout):
    x = in_layout(torch.randn(3, 8, 9, 9), layout)
    _assert_equals_composition(x, needs_grad_x=False, kernel_size=3, stride=2, padding=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_number_of_threads_changes_a_bit(layout):
    x = in_layout(torch.randn(8, 40, 65, 64, generator=torch.Generator().manual_seed(0)), layout)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                _outputs_gradients_and_statistics(
                    batch_norm_relu_max_pool2d, x, kernel_size=3, stride=2, padding=1
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2])
def test_an_argmax_that_no_forward_pass_wrote_stays_inside_the_gradient(layout, stride):
    x = in_layout(torch.randn(2, 3, 8, 9), layout)
    parameters = ([2, 2], [stride, stride], [1, 1], [1, 1], False)
    output, argmax, mean, variance = torch.ops.skinfast.batch_norm_relu_max_pool2d(
        x, None, None, None, None, True, 1e-5, *parameters
    )
    for grad in torch.ops.skinfast.batch_norm_relu_max_pool2d_backward(
        torch.ones_like(output), argmax.fill_(254), x, mean, variance, None, True, 1e-5,
        *parameters, True,
    ):  # fmt: skip
        assert not grad.any()


X = torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": X.int()}, "x has dtype int32; on the CPU it needs"),
        ({"input": X[0]}, r"x has shape \[3, 4, 4\]; it needs 4 dimensions \[N, C, H, W\]"),
        ({"weight": torch.ones(4)}, r"weight has shape \[4\]; it needs \[3\]"),
        ({"kernel_size": 5}, "x has 4 rows or columns, 0 of padding included; a window needs 5"),
        ({"padding": 2}, "padding has 2 for a kernel of 2; it needs at most half the kernel"),
        ({"running_mean": None}, "one of running_mean and running_var is None"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {
        "input": X,
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "kernel_size": 2,
    }
    with pytest.raises(RuntimeError, match=f"^batch_norm_relu_max_pool2d: {message}"):
        batch_norm_relu_max_pool2d(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_output": X}, r"grad_output has shape \[2, 3, 4, 4\]; it needs \[2, 3, 2, 2\]"),
        ({"argmax": X[..., :2, :2]}, "argmax has dtype float32; it needs uint8"),
        ({"argmax": X.byte()}, r"argmax has shape \[2, 3, 4, 4\]; it needs \[2, 3, 2, 2\]"),
        ({"mean": torch.zeros(2)}, r"mean has shape \[2\]; it needs \[3\]"),
    ],
)
def test_bad_input_of_the_gradient_is_refused_by_name(change, message):
    arguments = {
        "grad_output": torch.ones(2, 3, 2, 2),
        "argmax": torch.zeros(2, 3, 2, 2, dtype=torch.uint8),
        "x": X,
        "mean": torch.zeros(3),
        "variance": torch.ones(3),
        "weight": None,
        "training": True,
        "eps": 1e-5,
        "kernel_size": [2, 2],
        "stride": [2, 2],
        "padding": [0, 0],
        "dilation": [1, 1],
        "ceil_mode": False,
        "needs_grad_x": True,
    }
    with pytest.raises(RuntimeError, match=f"^batch_norm_relu_max_pool2d_backward: {message}"):
        torch.ops.skinfast.batch_norm_relu_max_pool2d_backward(**(arguments | change))
