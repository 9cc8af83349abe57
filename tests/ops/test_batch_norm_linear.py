"""batch_norm_linear: what is special to it; test_every_op.py holds what every op must do."""

import pytest
import torch
from torch.nn import functional as F

from skinfast.ops.batch_norm_linear import MAX_OUTPUTS, batch_norm_linear, reference
from skinfast.testing import RecordOps


def call(rows=8, features=12, outputs=3, dtype=torch.float32):
    """input, running_mean, running_var, norm_weight, norm_bias, weight, bias."""
    tensors = [torch.randn(rows, features), torch.zeros(features), torch.ones(features)]
    tensors += [torch.rand(features) + 0.5, torch.randn(features)]
    tensors += [torch.randn(outputs, features), torch.randn(outputs)]
    tensors = [tensor.to(dtype) for tensor in tensors]
    return tensors[:3] + [tensor.requires_grad_() for tensor in tensors[3:]]


def ops_called(*args, **kwargs):
    with RecordOps() as record:
        batch_norm_linear(*args, **kwargs)
    return {overload._schema.name for overload, _, _ in record.calls}


def test_input_that_needs_a_gradient_has_one():
    args = call(dtype=torch.float64)
    args[0].requires_grad_()
    assert "skinfast::batch_norm_relu" in ops_called(*args, training=True)
    gradients = [
        torch.autograd.grad(function(*args, training=True).square().sum(), [args[0], *args[3:]])
        for function in (batch_norm_linear, reference)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("outputs", [1, 7, 8, 9, MAX_OUTPUTS, MAX_OUTPUTS + 1])
def test_any_number_of_outputs(outputs):
    args = call(outputs=outputs, dtype=torch.float64)
    fused = "skinfast::batch_norm_linear" in ops_called(*args, training=True)
    assert fused == (outputs <= MAX_OUTPUTS)
    results = []
    for function in (batch_norm_linear, reference):
        output = function(*args, training=True)
        results.append([output, *torch.autograd.grad(output.square().sum(), args[3:])])
    torch.testing.assert_close(*results)


def test_the_low_level_op_refuses_a_gradient_of_x():
    x, *_, weight, _ = call()
    output, *_ = torch.ops.skinfast.batch_norm_linear(
        x.requires_grad_(), weight, None, None, None, None, None, True, 1e-5
    )
    with pytest.raises(RuntimeError, match="has no gradient of x"):
        output.sum().backward()


def test_running_statistics_follow_pytorch_over_steps():
    args = call(rows=150)
    ours, theirs = [(torch.zeros(12), torch.ones(12)) for _ in range(2)]
    for step in range(4):
        x = torch.randn(150, 12) * (step + 1) + step
        batch_norm_linear(x, *ours, *args[3:], training=True, momentum=0.3)
        F.batch_norm(x, *theirs, training=True, momentum=0.3)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        batch_norm_linear(args[0], *ours, *args[3:]), reference(args[0], *ours, *args[3:])
    )


def test_evaluation_and_an_empty_batch_leave_the_running_statistics_alone():
    args = call()
    batch_norm_linear(*args)
    assert batch_norm_linear(torch.empty(0, 12), *args[1:], training=True).shape == (0, 3)
    assert args[1].tolist() == [0.0] * 12
    assert args[2].tolist() == [1.0] * 12


@pytest.mark.parametrize("rows", [2, 64, 300, 2000])
def test_an_offset_far_beyond_the_deviation_costs_no_accuracy(rows):
    args = call(rows, 20)
    x = torch.randn(rows, 20).double().add(1e4).float()
    exact = [tensor.detach().double() for tensor in args]
    actual = batch_norm_linear(x, *args[1:], training=True, momentum=1.0, eps=1e-3)
    expected = reference(x.double(), *exact[1:], training=True, momentum=1.0, eps=1e-3)
    # The mean, of 1e4, is off by up to half a unit in its last place, 5e-4: for each of the 20
    # features once. With two rows, variances that are near 0 raise it.
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-2 if rows > 2 else 0.2)
    torch.testing.assert_close(args[2].double(), exact[2], rtol=1e-4 if rows > 2 else 1e-2, atol=0)


@pytest.mark.parametrize("shape", [(64, 3000, 7), (700, 300, 16)])
def test_any_number_of_threads_gives_the_same_bits(shape):
    args = call(*shape)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            statistics = [torch.zeros(shape[1]), torch.ones(shape[1])]
            output = batch_norm_linear(args[0], *statistics, *args[3:], training=True)
            gradients = torch.autograd.grad(output, args[3:], torch.ones_like(output) * output)
            results.append([output, *statistics, *gradients])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rest", [torch.float32, torch.bfloat16])
def test_16_bit_input_takes_the_rest_in_either_dtype(training, rest):
    args = call(40, 30, 5)
    args = [args[0].bfloat16(), *(a.detach().to(rest).requires_grad_() for a in args[1:])]
    output = batch_norm_linear(args[0], *(a.detach() for a in args[1:3]), *args[3:], training)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.sum(), args[3:])
    assert [g.dtype for g in gradients] == [rest] * 4
    exact = [a.detach().double().requires_grad_() for a in args]
    expected = reference(exact[0].detach(), *(a.detach() for a in exact[1:3]), *exact[3:], training)
    torch.testing.assert_close(output.double(), expected, rtol=8e-3, atol=8e-3)
    exact_gradients = torch.autograd.grad(expected.sum(), exact[3:])
    for actual, wanted in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=8e-3, atol=1e-4)


def test_under_autocast_the_sums_are_those_of_float32():
    args = call(64, 600, 7)
    expected = batch_norm_linear(*args, training=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = batch_norm_linear(*args, training=True)
    assert torch.equal(actual, expected.bfloat16())
    assert torch.autograd.grad(actual.sum(), args[5])[0].dtype == torch.float32
    doubles = call(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert batch_norm_linear(*doubles).dtype == torch.float64


def test_a_single_row_is_refused_in_training():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        batch_norm_linear(*call(rows=1), training=True)


# --- bytes ----------------------------------------------------------------------------------------

SCALE, SHIFT = torch.tensor([0.028, 0.026, 0.023]), torch.tensor([-5.4, -3.7, -3.4])


def bytes_call(rows=8, features=12, outputs=3):
    """As ``call``, with pixels of three channels."""
    pixels = torch.randint(0, 256, (rows, features), dtype=torch.uint8)
    return [pixels, *call(rows, features, outputs)[1:]]


def normalised(pixels, dtype=torch.float32):
    planes = pixels.view(len(pixels), 3, -1).to(dtype)
    return (planes * SCALE.to(dtype)[:, None] + SHIFT.to(dtype)[:, None]).flatten(1)


def outcome(function, args, training=True, **pixels):
    """Output, running statistics and gradients, of copies."""
    args = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in args]
    output = function(*args, training=training, momentum=0.3, eps=1e-3, **pixels)
    gradients = torch.autograd.grad(output.square().sum(), args[3:])
    return {"output": output.detach(), "mean": args[1], "variance": args[2]} | dict(
        zip(("norm_weight", "norm_bias", "weight", "bias"), gradients, strict=True)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 1), (8, 12, 3), (64, 768, 7), (67, 1215, 16)])
def test_bytes_are_as_exact_as_the_floats_that_they_stand_for(shape, training):
    args = bytes_call(*shape)
    ours = outcome(batch_norm_linear, args, training, scale=SCALE, shift=SHIFT)
    floats = outcome(batch_norm_linear, [normalised(args[0]), *args[1:]], training)
    doubles = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in args[1:]]
    exact = outcome(reference, [normalised(args[0], torch.float64), *doubles], training)
    for name, value in ours.items():
        size = exact[name].abs().max().clamp(min=1e-30)  # running means may be 0
        error, of_floats = (
            (v.double() - exact[name]).abs().max() / size for v in (value, floats[name])
        )
        assert error <= 2 * of_floats + 2e-6, name


@pytest.mark.parametrize("rows", [2, 300, 70_000])
def test_statistics_of_bytes_are_exact(rows):
    """Beyond the rows whose squares 32 bits hold, and without variance."""
    pixels = torch.randint(250, 256, (rows, 6), dtype=torch.uint8)
    pixels[:, 1], pixels[:, 3], pixels[0, 3] = 255, 255, 254
    _, mean, variance = torch.ops.skinfast.batch_norm_linear(
        pixels, torch.ones(1, 6), *[None] * 5, True, 1e-5, torch.ones(1), torch.zeros(1)
    )
    exact = pixels.double()
    assert torch.equal(mean, exact.mean(0).float())
    torch.testing.assert_close(variance, exact.var(0, correction=0).float(), rtol=2e-7, atol=0)
    assert variance[1] == 0


@pytest.mark.parametrize("shape", [(64, 3000, 7), (700, 300, 16)])
def test_any_number_of_threads_gives_the_same_bits_from_bytes(shape):
    args = bytes_call(*shape)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outcome(batch_norm_linear, args, scale=SCALE, shift=SHIFT))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_bytes_under_autocast():
    args = bytes_call(64, 600, 7)
    expected = batch_norm_linear(*args, training=True, scale=SCALE, shift=SHIFT)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = batch_norm_linear(*args, training=True, scale=SCALE, shift=SHIFT)
    assert torch.equal(actual, expected.bfloat16())


BYTES = torch.ones(2, 3).byte()
OF_BYTES = [
    ({"scale": None, "shift": None}, "x has dtype uint8; it needs scale and shift"),
    ({"shift": None}, "x has dtype uint8; it needs scale and shift"),
    ({"x": torch.ones(2, 3)}, "scale or shift is given and x has dtype float32; they need uint8"),
    ({"scale": SCALE.double()}, "scale has dtype float64; it needs float32"),
    ({"scale": SCALE[:2]}, r"scale has shape \[2\]; its length needs to divide 3, the number of"),
    ({"scale": SCALE[:0]}, r"scale has shape \[0\]; its length needs to divide 3"),
    ({"scale": SCALE[None]}, r"scale has shape \[1, 3\]; it needs 1 dimensions \[C\]"),
    ({"shift": SHIFT[:1]}, r"shift has shape \[1\]; it needs \[3\]"),
    ({"weight": torch.ones(4, 3).byte()}, "weight has dtype uint8; it needs float32"),
    ({"norm_weight": torch.ones(3).byte()}, "norm_weight has dtype uint8; it needs float32"),
]


@pytest.mark.parametrize(("change", "message"), OF_BYTES)
def test_bad_bytes_are_refused_by_name(change, message):
    change = {"x": BYTES, "scale": SCALE, "shift": SHIFT, **change}
    for op, arguments in (("batch_norm_linear", FORWARD), ("batch_norm_linear_backward", BACKWARD)):
        with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
            getattr(torch.ops.skinfast, op)(**{**arguments, **change})


def test_a_gradient_of_bytes_output_is_float32():
    change = {"x": BYTES, "scale": SCALE, "shift": SHIFT, "grad_output": torch.ones(2, 4).byte()}
    with pytest.raises(RuntimeError, match="grad_output has dtype uint8; it needs float32"):
        torch.ops.skinfast.batch_norm_linear_backward(**{**BACKWARD, **change})


FORWARD = {
    "x": torch.ones(2, 3),
    "weight": torch.ones(4, 3),
    "bias": None,
    "norm_weight": None,
    "norm_bias": None,
    "running_mean": None,
    "running_var": None,
    "training": True,
    "eps": 0.0,
}
BACKWARD = {
    "grad_output": torch.ones(2, 4),
    "x": torch.ones(2, 3),
    "mean": torch.ones(3),
    "variance": torch.ones(3),
    "weight": torch.ones(4, 3),
    "norm_weight": None,
    "norm_bias": None,
    "eps": 0.0,
}
OF_BOTH = [
    ({"x": torch.ones(3)}, r"x has shape \[3\]; it needs 2 dimensions \[N, F\]"),
    ({"x": torch.ones(2, 0)}, r"x has shape \[2, 0\]; it needs at least 1 feature"),
    ({"x": torch.ones(2, 3).int()}, "x has dtype int32; on the CPU it needs"),
    ({"x": torch.ones(2, 3).half()}, "x has dtype float16; on the CPU it needs"),
    ({"weight": torch.ones(4, 3).double()}, "weight has dtype float64; it needs float32"),
    ({"weight": torch.ones(3)}, r"weight has shape \[3\]; it needs 2 dimensions \[K, F\]"),
    ({"weight": torch.ones(17, 3)}, r"weight has shape \[17, 3\]; it needs 1 to 16 rows"),
    ({"weight": torch.ones(0, 3)}, r"weight has shape \[0, 3\]; it needs 1 to 16 rows"),
    ({"weight": torch.ones(4, 2)}, r"weight has shape \[4, 2\]; it needs \[4, 3\]"),
    ({"norm_weight": torch.ones(2)}, r"norm_weight has shape \[2\]; it needs \[3\]"),
    ({"norm_bias": torch.ones(3).double()}, "norm_bias has dtype float64; it needs float32"),
    ({"eps": -1.0}, "eps is -1; it needs to be 0 or more"),
]
OF_FORWARD = [
    ({"bias": torch.ones(3)}, r"bias has shape \[3\]; it needs \[4\]"),
    ({"bias": torch.ones(4).double()}, "bias has dtype float64 and weight has float32"),
    ({"running_mean": torch.ones(2)}, r"running_mean has shape \[2\]; it needs \[3\]"),
    ({"running_var": torch.ones(3).double()}, "running_var has dtype float64; it needs float32"),
    ({"running_mean": torch.ones(3)}, "one of running_mean and running_var is None"),
    ({"training": False}, "running_mean is None; evaluation needs running_mean and running_var"),
]
OF_BACKWARD = [
    ({"grad_output": torch.ones(2, 3)}, r"grad_output has shape \[2, 3\]; it needs \[2, 4\]"),
    ({"grad_output": torch.ones(2, 4).double()}, "grad_output has dtype float64 and x has float32"),
    ({"mean": torch.ones(2)}, r"mean has shape \[2\]; it needs \[3\]"),
    ({"variance": torch.ones(3).double()}, "variance has dtype float64; it needs float32"),
]


@pytest.mark.parametrize(("change", "message"), OF_BOTH + OF_FORWARD)
def test_bad_input_is_refused_by_name(change, message):
    with pytest.raises(RuntimeError, match=f"^batch_norm_linear: {message}"):
        torch.ops.skinfast.batch_norm_linear(**{**FORWARD, **change})


@pytest.mark.parametrize(("change", "message"), OF_BOTH + OF_BACKWARD)
def test_bad_input_of_the_gradient_is_refused_by_name(change, message):
    with pytest.raises(RuntimeError, match=f"^batch_norm_linear_backward: {message}"):
        torch.ops.skinfast.batch_norm_linear_backward(**{**BACKWARD, **change})
