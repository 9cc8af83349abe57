"""What is special to batch_norm_relu_conv2d; tests/ops/test_every_op.py holds the rest.

That its backward pass takes the sums from the tensor-core kernel where there is one:
tests/emulation/test_tensor_core_host.py, and on a GPU tests/ops/test_conv2d_tensor_core.py.
"""

import pytest
import torch

from skinfast.ops import batch_norm_relu, batch_norm_relu_conv2d, conv2d, conv2d_statistics
from skinfast.testing import in_layout

ONES = torch.ones
GEOMETRY = {"stride": 2, "padding": 1}


def composition(x, *args, weight, statistics=None, return_statistics=False, **geometry):
    normalized = batch_norm_relu(x, *args, training=True, statistics=statistics)
    if return_statistics:
        return conv2d_statistics(normalized, weight, **geometry)
    return conv2d(normalized, weight, **geometry)


def fused(x, *args, **keywords):
    return batch_norm_relu_conv2d(x, *args, training=True, **keywords)


def results(function, x, weight, needs=(True, True, True), **keywords):
    """Outputs, the needed gradients of x, of the norm's parameters and of weight, statistics."""
    generator = torch.Generator().manual_seed(1)
    running = [torch.zeros(x.shape[1]), torch.ones(x.shape[1])]
    norm = [torch.randn(x.shape[1], generator=generator) for _ in range(2)]
    wanted = (needs[0], needs[1], needs[1], needs[2])
    tensors = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_(need)
        for t, need in zip((x, *norm, weight), wanted, strict=True)
    ]
    outputs = function(tensors[0], *running, *tensors[1:3], weight=tensors[3], **keywords)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grad = torch.randn(outputs[0].shape, generator=generator).to(x.dtype)
    gradients = torch.autograd.grad(outputs[0], [t for t in tensors if t.requires_grad], grad)
    return [output.detach() for output in outputs], gradients, running


def tensors(dtype=torch.float32, layout="channels_last"):
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 32, 5, 4), (24, 32, 3, 3)
    return [in_layout(torch.randn(s, generator=generator).to(dtype), layout) for s in shapes]


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        for value, wanted in zip(ours, theirs, strict=True):
            assert torch.equal(value, wanted) and value.stride() == wanted.stride()


@pytest.mark.parametrize("with_statistics", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_two_ops_to_the_bit(dtype, layout, with_statistics):
    keywords = {**GEOMETRY, "return_statistics": with_statistics}
    both = [results(f, *tensors(dtype, layout), **keywords) for f in (fused, composition)]
    assert_same(*both)
    assert len(both[0][0]) == 1 + with_statistics


def test_takes_the_statistics_of_its_input():
    x, weight = tensors()
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    statistics = torch.stack([mean + 1, variance])  # not those, so that a use shows
    keywords = {**GEOMETRY, "statistics": statistics}
    both = [results(f, x, weight, **keywords) for f in (fused, composition)]
    assert_same(*both)
    assert not torch.equal(both[0][0][0], results(fused, x, weight, **GEOMETRY)[0][0])


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_the_wanted_gradients_are_returned(needs):
    assert_same(*[results(f, *tensors(), needs, **GEOMETRY) for f in (fused, composition)])


def test_the_returned_statistics_have_no_gradient():
    x, weight = tensors()
    output, statistics = batch_norm_relu_conv2d(
        x, None, None, None, None, weight.requires_grad_(), training=True, return_statistics=True
    )
    assert output.requires_grad and not statistics.requires_grad


def test_a_batch_of_one_value_a_channel_is_refused():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused(ONES(1, 3, 1, 1), None, None, None, None, weight=ONES(4, 3, 1, 1))


X, RUNNING = ONES(1, 3, 8, 8), (torch.zeros(3), ONES(3))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, *RUNNING, None, None, ONES(10, 4, 1, 1)), "input has 3 channels and needs"),
        ((X, *RUNNING, None, None, ONES(10, 3, 1, 1).double()), "weight has dtype float64 and"),
        ((X, *RUNNING, ONES(4), None, ONES(10, 3, 1, 1)), r"norm_weight has shape \[4\]; it needs"),
        ((X, *RUNNING, None, ONES(3).int(), ONES(10, 3, 1, 1)), "norm_bias has dtype int32"),
        ((X[0], *RUNNING, None, None, ONES(10, 3, 1, 1)), "input has shape .* 4 dimensions"),
    ],
)
def test_bad_input_is_refused_by_name(args, message):
    with pytest.raises(RuntimeError, match=f"^batch_norm_relu_conv2d: .*{message}"):
        batch_norm_relu_conv2d(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_output": X}, r"grad_output has shape \[1, 3, 8, 8\]; it needs \[1, 5, 8, 8\]"),
        ({"normalized": X.double()}, "normalized has dtype float64"),
        ({"mask": torch.zeros(23).byte()}, r"mask has shape \[23\]; it needs \[24\]"),
        ({"mask": torch.zeros(24)}, "mask has dtype float32; it needs uint8"),
    ],
)
def test_bad_input_of_the_gradient_is_refused_by_name(change, message):
    arguments = {
        "grad_output": ONES(1, 5, 8, 8),
        "normalized": X,
        "weight": ONES(5, 3, 1, 1),
        "x": X,
        "mask": torch.zeros(24, dtype=torch.uint8),
        "mean": torch.zeros(3),
        "variance": ONES(3),
        "norm_weight": None,
        "training": True,
        "eps": 1e-5,
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 1,
        "want_input": True,
        "want_weight": True,
    }
    with pytest.raises(RuntimeError, match=f"^batch_norm_relu_conv2d_backward: {message}"):
        torch.ops.skinfast.batch_norm_relu_conv2d_backward(**(arguments | change))
