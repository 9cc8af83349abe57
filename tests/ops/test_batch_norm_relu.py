"""batch_norm_relu: what is special to it; tests/ops/test_every_op.py holds what every op must do.

The second half is shared with batch_norm_add_relu, whose kernels are the same.
"""

import pytest
import torch
from torch.nn import functional as F

from skinfast.ops.batch_norm_add_relu import batch_norm_add_relu
from skinfast.ops.batch_norm_relu import batch_norm_relu, statistics_of
from skinfast.testing import in_layout

LAYOUTS = ("contiguous", "channels_last")


def without_residual(x, *args, **kwargs):
    return batch_norm_relu(x, *args, **kwargs)


def with_residual(x, *args, **kwargs):
    return batch_norm_add_relu(x, torch.zeros_like(x), *args, **kwargs)


both = pytest.mark.parametrize("op", [without_residual, with_residual])


def test_without_relu_it_is_batch_norm():
    x = torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(
        batch_norm_relu(x, None, None, training=True, relu=False),
        F.batch_norm(x, None, None, training=True),
    )


def test_gradient_stops_at_zero_and_passes_at_nan():
    x = torch.tensor([[-1.0], [0.0], [2.0], [float("nan")]], requires_grad=True)
    batch_norm_relu(x, torch.zeros(1), torch.ones(1), eps=0.0).sum().backward()
    assert x.grad.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


def test_input_that_needs_no_gradient_costs_none():
    x = torch.randn(8, 40)
    weight = torch.ones(40, requires_grad=True)
    output = batch_norm_relu(x, None, None, weight, training=True)
    expected = torch.relu(F.batch_norm(x, None, None, weight, training=True))
    (actual,), (expected,) = (torch.autograd.grad(y.sum(), weight) for y in (output, expected))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 4, 5, 2)])
def test_any_number_of_trailing_dimensions(shape):
    x = torch.randn(shape)
    torch.testing.assert_close(
        batch_norm_relu(x, None, None, training=True),
        torch.relu(F.batch_norm(x, None, None, training=True)),
    )


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0])
def test_running_statistics_follow_pytorch_over_steps(op, layout, momentum):
    statistics = [(torch.zeros(12), torch.ones(12)) for _ in range(2)]
    for step in range(4):
        x = in_layout(torch.randn(6, 12, 5, 3) * (step + 1) + step, layout)
        op(x, *statistics[0], training=True, momentum=momentum)
        F.batch_norm(x, *statistics[1], training=True, momentum=momentum)
    torch.testing.assert_close(statistics[0], statistics[1])
    x = in_layout(torch.randn(6, 12, 5, 3), layout)
    torch.testing.assert_close(op(x, *statistics[0]), torch.relu(F.batch_norm(x, *statistics[1])))


@both
def test_evaluation_leaves_the_running_statistics_alone(op):
    mean, var = torch.zeros(3), torch.ones(3)
    op(torch.randn(4, 3), mean, var)
    assert mean.tolist() == [0, 0, 0]
    assert var.tolist() == [1, 1, 1]


@both
def test_an_empty_batch_leaves_the_running_statistics_alone(op):
    mean, var = torch.zeros(3), torch.ones(3)
    assert op(torch.randn(0, 3, 2, 2), mean, var, training=True).shape == (0, 3, 2, 2)
    assert mean.tolist() == [0, 0, 0]
    assert var.tolist() == [1, 1, 1]


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 20, 9, 9), (500, 10), (2, 3, 40, 40), (64, 6, 2, 2)])
def test_an_offset_far_beyond_the_deviation_costs_no_accuracy(op, layout, shape):
    x = in_layout(torch.randn(shape, dtype=torch.float64) + 1e4, layout).float()
    statistics = (torch.zeros(shape[1]), torch.ones(shape[1]))
    actual = op(x, *statistics, training=True, momentum=1.0)
    exact = (torch.zeros(shape[1]).double(), torch.ones(shape[1]).double())
    expected = torch.relu(F.batch_norm(x.double(), *exact, training=True, momentum=1.0))
    # Half a unit in the last place of a mean of 1e4 is 5e-4.
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(statistics[1].double(), exact[1], rtol=1e-5, atol=0)


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(40, 70, 9, 9), (70, 3000), (2, 5, 70, 70), (300, 9, 2, 2)])
def test_any_number_of_threads_gives_the_same_bits(op, layout, shape):
    x = in_layout(torch.randn(shape), layout).requires_grad_()
    weight = torch.randn(shape[1], requires_grad=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            statistics = (torch.zeros(shape[1]), torch.ones(shape[1]))
            output = op(x, *statistics, weight, training=True)
            gradients = torch.autograd.grad(output, (x, weight), torch.ones_like(output) * output)
            results.append((output, *statistics, *gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@both
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16])
def test_16_bit_input_takes_vectors_in_either_dtype(op, training, vectors):
    x = torch.randn(16, 10, 4, 4).bfloat16().requires_grad_()
    weight, bias = (torch.rand(10).to(vectors).requires_grad_() for _ in range(2))
    statistics = torch.zeros(10).to(vectors), torch.ones(10).to(vectors)
    output = op(x, *statistics, weight, bias, training)
    grads = torch.autograd.grad(output.sum(), (x, weight, bias))
    assert output.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.bfloat16, vectors, vectors]

    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    means = torch.zeros(10).double(), torch.ones(10).double()
    expected = torch.relu(F.batch_norm(exact[0], *means, *exact[1:], training))
    expected_grads = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(output.double(), expected, rtol=8e-3, atol=8e-3)
    for actual, wanted in zip(grads[1:], expected_grads[1:], strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=8e-3, atol=0.3)
    if training:
        torch.testing.assert_close(statistics[1].double(), means[1], rtol=8e-3, atol=0)


@both
def test_output_takes_the_layout_of_input(op):
    x = torch.randn(2, 3, 4, 5)
    assert op(x, None, None, training=True).is_contiguous()
    x = x.contiguous(memory_format=torch.channels_last)
    output = op(x, None, None, training=True)
    assert output.is_contiguous(memory_format=torch.channels_last)


@both
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_a_single_value_per_channel_is_refused_in_training(op, shape):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        op(torch.randn(shape), None, None, training=True)


ONES = torch.ones(3)
BAD_ARGUMENTS = [
    ((torch.ones(3), ONES, ONES), {}, r"x has shape \[3\]; it needs at least 2 dimensions"),
    ((torch.ones(2, 3).int(), ONES, ONES), {}, "x has dtype int32; on the CPU it needs"),
    ((torch.ones(2, 3).half(), ONES, ONES), {}, "x has dtype float16; on the CPU it needs"),
    ((torch.ones(2, 3), torch.ones(2), ONES), {}, r"running_mean has shape \[2\]; it needs \[3\]"),
    ((torch.ones(2, 3), ONES, ONES.double()), {}, "running_var has dtype float64; it needs"),
    ((torch.ones(2, 3), ONES, None), {}, "one of running_mean and running_var is None"),
    ((torch.ones(2, 3), None, None), {}, "running_mean is None; evaluation needs running_mean"),
    ((torch.ones(2, 3), ONES, ONES), {"weight": torch.ones(4)}, r"weight has shape \[4\]"),
    ((torch.ones(2, 3), ONES, ONES), {"bias": ONES.bfloat16()}, "bias has dtype bfloat16; it"),
    ((torch.ones(2, 3), ONES, ONES), {"eps": -1.0}, "eps is -1; it needs to be 0 or more"),
]


@both
@pytest.mark.parametrize(("args", "kwargs", "message"), BAD_ARGUMENTS)
def test_bad_input_is_refused_by_name(op, args, kwargs, message):
    name = "batch_norm_add_relu" if op is with_residual else "batch_norm_relu"
    with pytest.raises(RuntimeError, match=f"^{name}: {message}"):
        op(*args, **kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_output": torch.ones(2, 4)}, r"grad_output has shape \[2, 4\]; it needs \[2, 3\]"),
        ({"grad_output": torch.ones(2, 3).double()}, "grad_output has dtype float64 and x has"),
        ({"mask": torch.ones(1)}, "mask has dtype float32; it needs uint8"),
        ({"mask": torch.ones(2).byte()}, r"mask has shape \[2\]; it needs \[1\]"),
        ({"mean": torch.ones(2)}, r"mean has shape \[2\]; it needs \[3\]"),
        ({"variance": torch.ones(3).double()}, "variance has dtype float64; it needs float32"),
        ({"weight": torch.ones(2)}, r"weight has shape \[2\]; it needs \[3\]"),
        ({"eps": -1.0}, "eps is -1"),
    ],
)
@pytest.mark.parametrize("name", ["batch_norm_relu_backward", "batch_norm_add_relu_backward"])
def test_bad_input_of_the_gradient_is_refused_by_name(name, change, message):
    arguments = {
        "grad_output": torch.ones(2, 3),
        "x": torch.ones(2, 3),
        "mask": torch.ones(1).byte(),
        "mean": ONES,
        "variance": ONES,
        "weight": None,
        "training": True,
        "eps": 0.0,
    }
    if name == "batch_norm_relu_backward":
        arguments["needs_grad_x"] = True
    with pytest.raises(RuntimeError, match=f"^{name}: {message}"):
        getattr(torch.ops.skinfast, name)(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.ones(3, 1)}, r"mean has shape \[3, 1\]; it needs 1 dimensions"),
        ({"running_mean": torch.ones(3).int()}, "running_mean has dtype int32; on the CPU"),
        ({"running_mean": torch.ones(2)}, r"running_mean has shape \[2\]; it needs \[3\]"),
        ({"running_var": torch.ones(3).double()}, "running_var has dtype float64 and running_mean"),
        ({"variance": torch.ones(2)}, r"variance has shape \[2\]; it needs \[3\]"),
        ({"mean": torch.ones(3).double()}, "mean has dtype float64; it needs float32"),
        ({"variance": torch.ones(3).double()}, "variance has dtype float64 and mean has float32"),
        ({"count": 1}, "count is 1; an unbiased variance needs 2 or more"),
    ],
)
def test_bad_input_of_the_update_is_refused_by_name(change, message):
    arguments = {
        "running_mean": torch.ones(3),
        "running_var": torch.ones(3),
        "mean": ONES,
        "variance": ONES,
        "count": 2,
        "momentum": 0.1,
    }
    with pytest.raises(RuntimeError, match=f"^batch_norm_update_: {message}"):
        torch.ops.skinfast.batch_norm_update_(**{**arguments, **change})


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_that_are_known_are_not_computed_again(op, dtype, layout):
    x = in_layout(torch.randn(4, 16, 5, 3).to(dtype).requires_grad_(), layout)
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (torch.randn(16, dtype=wide, requires_grad=True) for _ in range(2))

    def run(given):
        running = [torch.zeros(16, dtype=wide), torch.ones(16, dtype=wide)]
        y = op(x, *running, weight, bias, training=True, statistics=given)
        grads = torch.autograd.grad(y, [x, weight, bias], torch.ones_like(y))
        return [y.detach(), *grads, *running]

    statistics = statistics_of(x)
    assert statistics.dtype == wide
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for value, expected in zip(run(statistics), run(None), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance * scale)
    # They are taken at their word.
    others = torch.stack([statistics[0] + 1, statistics[1] * 4])
    output, *_, running_mean, running_var = run(others)
    torch.testing.assert_close(output, op(x, *others, weight, bias).detach())
    torch.testing.assert_close(running_mean, 0.1 * others[0])
    torch.testing.assert_close(running_var, 0.9 + 0.1 * others[1] * 60 / 59)


@both
@pytest.mark.parametrize(
    ("statistics", "training", "message"),
    [
        (torch.ones(2, 3), False, "statistics are given; evaluation takes running_mean"),
        (torch.ones(3, 2), True, r"statistics has shape \[3, 2\]; it needs \[2, 3\]"),
        (torch.ones(2, 3).double(), True, "statistics has dtype float64; it needs float32"),
    ],
)
def test_bad_statistics_are_refused_by_name(op, statistics, training, message):
    vectors = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match=f"^batch_norm_(add_)?relu: {message}"):
        op(torch.ones(2, 3), *vectors, training=training, statistics=statistics)
