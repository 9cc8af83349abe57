"""cross_entropy: what is special to it; tests/ops/test_every_op.py holds what every op must do."""

import pytest
import torch
import torch.nn.functional as F

from skinfast.ops.cross_entropy import cross_entropy

NAN, INFINITY = float("nan"), float("inf")


def _with_gradient(loss, x, *args, **kwargs):
    x = x.detach().clone().requires_grad_()
    value = loss(x, *args, **kwargs)
    (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), grad


def _assert_as_torch(x, *args, **kwargs):
    actual = _with_gradient(cross_entropy, x, *args, **kwargs)
    expected = _with_gradient(F.cross_entropy, x, *args, **kwargs)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [2, 7, 16, 17, 200])
def test_every_setting_is_torchs(reduction, label_smoothing, weighted, classes):
    x = 4 * torch.randn(150, classes)
    target = torch.randint(classes, (150,))
    target[::7] = -100
    weight = torch.rand(classes) if weighted else None
    _assert_as_torch(
        x, target, weight, reduction=reduction, label_smoothing=label_smoothing, ignore_index=-100
    )


def test_exponentials_are_right_over_the_whole_range_of_float32():
    x = torch.linspace(-110, 0, 20001).reshape(-1, 1)
    logits = torch.cat([torch.zeros_like(x), x], dim=1)
    _, grad = _with_gradient(
        cross_entropy, logits, torch.zeros(len(x), dtype=torch.long), reduction="sum"
    )
    exact = torch.sigmoid(x.double()).squeeze(1)
    # 2 units in the last place, and up to 4.8e-7 from rounding the exponent between 8 and 16.
    torch.testing.assert_close(grad[:, 1].double(), exact, rtol=7.5e-7, atol=2e-38)


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4, 1e8])
def test_a_small_loss_keeps_its_digits_beside_large_logits(shift):
    x = torch.tensor([[8.0, 0.0, -8.0]]) + shift
    _assert_as_torch(x, torch.tensor([0]))


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("where", [(0, 0), (0, 2), slice(None)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_nan_and_infinity_spread_as_in_torch(value, where, label_smoothing):
    x = torch.randn(3, 4)
    x[where] = value
    target = torch.tensor([0, 1, 2])
    _assert_as_torch(x, target, label_smoothing=label_smoothing, reduction="none")
    _assert_as_torch(x, target, torch.tensor([0.0, 1, 2, 3]), label_smoothing=label_smoothing)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_and_only_ignored_rows(reduction):
    _assert_as_torch(torch.empty(0, 7), torch.empty(0, dtype=torch.long), reduction=reduction)
    _assert_as_torch(torch.randn(3, 7), torch.full((3,), -100), reduction=reduction)


def test_a_row_that_is_ignored_takes_no_gradient_even_where_it_is_nan():
    x = torch.tensor([[NAN, 1.0], [1.0, 2.0]])
    loss, grad = _with_gradient(cross_entropy, x, torch.tensor([-100, 0]))
    assert loss.isfinite()
    assert grad[0].tolist() == [0.0, 0.0]


def test_a_class_as_ignore_index_is_ignored():
    _assert_as_torch(torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0]), ignore_index=1)


def test_autocast_computes_in_float32_and_gives_gradients_in_the_inputs_dtype():
    x = torch.randn(4, 7, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(x, torch.arange(4), torch.rand(7, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad.dtype == torch.bfloat16


def test_no_number_of_threads_changes_a_bit():
    x, target = torch.randn(3000, 37), torch.randint(37, (3000,))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_with_gradient(cross_entropy, x, target, label_smoothing=0.1))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_compiles_with_a_batch_of_any_size():
    compiled = torch.compile(cross_entropy, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (4, 5):
        x, target = torch.randn(rows, 3, requires_grad=True), torch.zeros(rows, dtype=torch.long)
        (grad,) = torch.autograd.grad(compiled(x, target), x)
        torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(x, target), x)[0])


def test_a_gradient_of_the_weights_is_refused():
    x, weight = torch.randn(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="cross_entropy: weight requires a gradient"):
        cross_entropy(x, torch.tensor([0, 1]), weight).backward()


X, TARGET = torch.zeros(4, 7), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X.int(), TARGET), {}, "input has dtype int32; on the CPU it needs"),
        ((X[0], TARGET[0]), {}, r"input has shape \[7\]; it needs 2 dimensions \[N, C\]"),
        ((X[..., None], TARGET[:, None]), {}, r"input has shape \[4, 7, 1\]; it needs 2 dim"),
        ((X[:, :0], TARGET), {}, r"input has shape \[4, 0\]; it needs at least one class"),
        ((X, X), {}, "target has dtype float32; it needs int64 class indices"),
        ((X, TARGET[:3]), {}, r"target has shape \[3\]; it needs \[4\]"),
        ((X, TARGET + torch.tensor([0, 0, 0, 9])), {}, "target has 9 at row 3; it needs a class"),
        ((X, TARGET - 1), {}, "target has -1 at row 0; it needs a class from 0 to 6 or ignore_ind"),
        ((X, TARGET, torch.ones(6)), {}, r"weight has shape \[6\]; it needs \[7\]"),
        ((X, TARGET, torch.ones(7).double()), {}, "weight has dtype float64 and input has float32"),
        ((X, TARGET), {"label_smoothing": 1.5}, "label_smoothing has 1.5; it needs a value from 0"),
        ((X, TARGET), {"label_smoothing": NAN}, "label_smoothing has nan; it needs a value from 0"),
    ],
)
def test_bad_input_is_refused_by_name(args, kwargs, message):
    with pytest.raises(RuntimeError, match=f"^cross_entropy: {message}"):
        cross_entropy(*args, **kwargs)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match=r"^cross_entropy: reduction has 'max'; it needs 'mean'"):
        cross_entropy(X, TARGET, reduction="max")
    with pytest.raises(RuntimeError, match=r"^cross_entropy: reduction has 3; it needs 0"):
        torch.ops.skinfast.cross_entropy(X, TARGET, None, -100, 3, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_loss": torch.ones(4)}, r"grad_loss has shape \[4\]; it needs \[\]"),
        ({"grad_loss": torch.ones(()).double()}, "grad_loss has dtype float64 and input has"),
        ({"target": TARGET + 7}, "target has 7 at row 0; it needs a class"),
        ({"normalizers": torch.ones(4)}, r"normalizers has shape \[4\]; it needs \[4, 2\]"),
        ({"normalizers": torch.ones(4, 2).double()}, "normalizers has dtype float64; it needs"),
        ({"total_weight": torch.ones(1)}, r"total_weight has shape \[1\]; it needs \[\]"),
        ({"total_weight": torch.ones(()).int()}, "total_weight has dtype int32; it needs float32"),
    ],
)
def test_bad_input_of_the_gradient_is_refused_by_name(change, message):
    arguments = {
        "grad_loss": torch.ones(()),
        "input": X,
        "target": TARGET,
        "weight": None,
        "normalizers": torch.ones(4, 2),
        "total_weight": torch.ones(()),
        "ignore_index": -100,
        "reduction": 1,
        "label_smoothing": 0.0,
    }
    with pytest.raises(RuntimeError, match=f"^cross_entropy_backward: {message}"):
        torch.ops.skinfast.cross_entropy_backward(**(arguments | change))
