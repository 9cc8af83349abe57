"""adam_: the update itself; tests/test_optim.py holds the optimizer against torch's."""

from itertools import chain

import pytest
import torch
from torch.optim.adam import adam as torch_adam

from skinfast import arena
from skinfast.ops.adam import adam_
from skinfast.testing import LOW_PRECISION_FACTOR, devices, dtypes

SETTINGS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
# No elements, one, less than a vector, odd, several chunks on either backend with a tail.
SHAPES = [(0, 4), (), (3,), (17, 5), (9001,), (2, 3, 5, 7)]


def arguments(shapes=SHAPES, device="cpu", dtype=torch.float32, amsgrad=False, seed=0):
    """Positional arguments of adam_ after some steps: every state is nonzero."""
    generator = torch.Generator().manual_seed(seed)

    def tensors(make=lambda t: t):
        return [
            make(torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)
            for shape in shapes
        ]

    largest = tensors(torch.abs) if amsgrad else []
    steps = [torch.tensor(float(i), device=device) for i, _ in enumerate(shapes)]
    return tensors(), tensors(), tensors(), tensors(torch.abs), largest, steps


def clones(lists):
    return tuple([t.clone() for t in tensors] for tensors in lists)


def assert_equal(first, second):
    for a, b in zip(chain(*first), chain(*second), strict=True):
        assert torch.equal(a, b)


def textbook(params, grads, exp_avgs, exp_avg_sqs, steps):
    """Kingma and Ba's algorithm 1 in float64."""
    result = []
    for p, g, m, v, t in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        p, g, m, v = (x.double() for x in (p, g, m, v))
        t = t.item() + 1
        g = g + SETTINGS["weight_decay"] * p
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        result.append(p - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
    return result


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("amsgrad", [False, True])
def test_is_the_update_of_the_paper(device, amsgrad):
    params, grads, exp_avgs, exp_avg_sqs, largest, steps = arguments(
        device=device, dtype=torch.float64, amsgrad=amsgrad
    )
    for value in largest:
        value.zero_()  # the new v is the largest then, and amsgrad changes nothing
    expected = textbook(params, grads, exp_avgs, exp_avg_sqs, steps)
    adam_(params, grads, exp_avgs, exp_avg_sqs, largest, steps, **SETTINGS, amsgrad=amsgrad)
    torch.testing.assert_close(params, expected)
    assert [step.item() for step in steps] == [i + 1 for i in range(len(SHAPES))]
    assert all(torch.equal(a, b) for a, b in zip(largest, exp_avg_sqs, strict=False))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_torchs_fused_adam(device, dtype):
    if dtype not in dtypes(device):
        pytest.skip(f"no {dtype} on the {device}")
    lists = arguments(device=device, dtype=dtype)
    exact = textbook(lists[0], lists[1], lists[2], lists[3], lists[5])
    theirs = clones(lists)
    for step in theirs[5]:
        step += 1
    torch._fused_adam_(*theirs, **SETTINGS, amsgrad=False, maximize=False)
    adam_(*lists, **SETTINGS)
    for ours, other, value in zip(lists[0], theirs[0], exact, strict=True):
        if value.numel():
            error = (ours.double() - value).abs().max()
            assert error <= LOW_PRECISION_FACTOR * (other.double() - value).abs().max()


@pytest.mark.parametrize("device", devices())
def test_takes_parameters_of_several_dtypes_in_one_call(device):
    together = [arguments(device=device, dtype=dtype) for dtype in dtypes(device)]
    apart = [clones(lists) for lists in together]
    adam_(*([*chain(*lists)] for lists in zip(*together, strict=True)), **SETTINGS)
    for mixed, single in zip(together, apart, strict=True):
        adam_(*single, **SETTINGS)
        assert_equal(mixed, single)


@pytest.mark.parametrize("device", devices())
def test_takes_more_tensors_than_one_launch_holds(device):
    together = arguments([(i % 7,) for i in range(1100)], device=device)
    apart = clones(together)
    adam_(*together, **SETTINGS)
    for p, g, m, v, t in zip(*apart[:4], apart[5], strict=True):
        adam_([p], [g], [m], [v], [], [t], **SETTINGS)
    assert_equal(together, apart)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_flat_tensor_is_the_list_to_the_bit(device, dtype, amsgrad):
    if dtype not in dtypes(device):
        pytest.skip(f"no {dtype} on the {device}")
    *lists, steps = arguments(device=device, dtype=dtype, amsgrad=amsgrad)
    flats = []
    for values in lists:
        views = arena.zeros_like(values)
        for view, value in zip(views, values, strict=True):
            view.copy_(value)
        flats.append((arena.flat(views), views))
    for value in steps:
        value.fill_(3)
    step = steps[0].clone()
    for _ in range(2):
        adam_(*lists, steps, **SETTINGS, amsgrad=amsgrad)
        adam_(*(flat for flat, _ in flats), [step], **SETTINGS, amsgrad=amsgrad)
    assert [len(flat) for flat, _ in flats] == [1, 1, 1, 1, int(amsgrad)]
    assert_equal(lists, [views for _, views in flats])


@pytest.mark.parametrize("device", devices())
def test_any_dense_layout_is_updated_in_memory_order_and_nothing_beside_it(device):
    def stored(tensor, order):
        """The same values at an odd offset between sentinels, dimensions stored in `order`."""
        buffer = tensor.new_full((tensor.numel() + 2,), 777.0)
        sizes = [tensor.shape[i] for i in order]
        inverse = [order.index(i) for i in range(tensor.dim())]
        view = buffer[1:-1].view(sizes).permute(inverse)
        view.copy_(tensor)
        return view, buffer

    lists = arguments([(4, 3, 5, 7)], device=device)
    expected = clones(lists)
    adam_(*expected, **SETTINGS)
    for order in [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)]:
        views, buffers = zip(*(stored(lists[i][0], order) for i in (0, 2, 3)), strict=True)
        grad = stored(lists[1][0], (1, 0, 2, 3))[0]  # in a layout of its own
        before = grad.clone()
        step = lists[5][0].clone()
        adam_([views[0]], [grad], [views[1]], [views[2]], [], [step], **SETTINGS)
        for view, i in zip(views, (0, 2, 3), strict=True):
            torch.testing.assert_close(view, expected[i][0], rtol=0, atol=0)
        assert torch.equal(grad, before)
        assert all(b[0] == 777.0 == b[-1] for b in buffers)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("amsgrad", [False, True])
def test_found_inf_leaves_everything_as_it_was(device, amsgrad):
    lists = arguments(device=device, amsgrad=amsgrad)
    before = clones(lists)
    adam_(*lists, **SETTINGS, amsgrad=amsgrad, found_inf=torch.tensor(1.0, device=device))
    assert_equal(lists, before)
    adam_(*lists, **SETTINGS, amsgrad=amsgrad, found_inf=torch.tensor(0.0, device=device))
    assert not torch.equal(lists[0][-1], before[0][-1])


@pytest.mark.parametrize("device", devices())
def test_gradients_are_divided_by_grad_scale_and_stay_as_they_are(device):
    lists = arguments(device=device)
    scaled = clones(lists)
    for grad in scaled[1]:
        grad *= 1024
    grads = clones([scaled[1]])
    adam_(*lists, **SETTINGS)
    adam_(*scaled, **SETTINGS, grad_scale=torch.tensor(1024.0, device=device))
    assert_equal([scaled[1]], grads)
    assert_equal([lists[0], *lists[2:]], [scaled[0], *scaled[2:]])


@pytest.mark.parametrize("device", devices())
def test_lr_may_be_a_tensor(device):
    number, tensor = arguments(device=device), arguments(device=device)
    settings = {**SETTINGS, "lr": 0.5**7}  # exact in float32
    adam_(*number, **settings)
    adam_(*tensor, **{**settings, "lr": torch.tensor([0.5**7], device=device)})
    assert_equal(number, tensor)


@pytest.mark.parametrize("device", devices())
def test_two_runs_are_equal_to_the_bit(device):
    first, second = (arguments([(100_001,), (257, 129)], device=device) for _ in range(2))
    adam_(*first, **SETTINGS)
    adam_(*second, **SETTINGS)
    assert_equal(first, second)


def test_one_thread_and_two_are_equal_to_the_bit():
    one, two = (arguments([(100_001,), (5,), (257, 129)]) for _ in range(2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        adam_(*one, **SETTINGS)
        torch.set_num_threads(2)
        adam_(*two, **SETTINGS)
    finally:
        torch.set_num_threads(threads)
    assert_equal(one, two)


@pytest.mark.parametrize("device", devices())
def test_nan_and_infinity_pass_as_in_torch(device):
    lists = arguments([(8,)], device=device, amsgrad=True)
    lists[0][0][0] = float("inf")
    lists[1][0][1] = float("nan")
    lists[1][0][2] = float("inf")
    lists[4][0][3] = float("nan")
    for weight_decay in (0.0, 0.1):
        ours, theirs = clones(lists), clones(lists)
        settings = {**SETTINGS, "weight_decay": weight_decay, "amsgrad": True, "maximize": False}
        adam_(*ours, **settings)
        torch_adam(*theirs, foreach=False, **settings)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_a_graph_that_saved_a_parameter_notices_the_update():
    param = torch.ones(3, requires_grad=True)
    loss = (param * param).sum()
    with torch.no_grad():
        adam_(*(([param],) + arguments([(3,)])[1:]), **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("amsgrad", [False, True])
def test_keeps_the_dispatchers_contract(device, amsgrad):
    settings = {"amsgrad": amsgrad, "maximize": False, "decoupled_weight_decay": False}
    tensors = {
        "lr_tensor": torch.ones((), device=device, dtype=torch.float64),
        "grad_scale": torch.ones((), device=device),
    }
    torch.library.opcheck(
        torch.ops.skinfast.adam_.default,
        (*arguments(device=device, amsgrad=amsgrad), []),
        {**SETTINGS, **settings, **tensors, "found_inf": torch.zeros((), device=device)},
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("device", devices())
def test_a_learning_rate_in_a_tensor_is_the_number(device):
    by_tensor, by_number = (arguments(device=device) for _ in range(2))
    for value in (1e-3, 0.3e-5):
        lr = torch.tensor(value, dtype=torch.float64, device=device)
        adam_(*by_tensor, **{**SETTINGS, "lr": lr})
        adam_(*by_number, **{**SETTINGS, "lr": value})
    assert_equal(by_tensor, by_number)


@pytest.mark.skipif("cuda" not in devices(), reason="needs a GPU")
def test_a_cuda_graph_records_the_call_and_follows_the_learning_rate():
    graphed, eager = (arguments(device="cuda") for _ in range(2))
    lr = torch.tensor(1e-3, device="cuda", dtype=torch.float64)
    saved = clones(graphed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adam_(*graphed, **{**SETTINGS, "lr": lr})
    assert_equal(graphed, saved)
    for value in (1e-3, 0.3e-5):
        lr.fill_(value)
        graph.replay()
        adam_(*eager, **{**SETTINGS, "lr": value})
    assert_equal(graphed, eager)


def with_item(position, value):
    lists = list(arguments([(2, 3)]))
    lists[position] = [value]
    return lists


ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("lists", "settings", "message"),
    [
        (with_item(1, torch.ones(3)), {}, r"grads\[0\] has shape \[3\]; it needs \[2, 3\]"),
        (with_item(2, torch.ones(6)), {}, r"exp_avgs\[0\] has shape \[6\]; it needs \[2, 3\]"),
        (with_item(1, ONE.double()), {}, r"grads\[0\] has dtype float64 and params\[0\] has"),
        (with_item(3, ONE.bfloat16()), {}, r"exp_avg_sqs\[0\] has dtype bfloat16 and params\[0\]"),
        (with_item(0, ONE.half()), {}, r"params\[0\] has dtype float16; on the CPU it needs"),
        (with_item(0, ONE.cfloat()), {}, r"params\[0\] has dtype another dtype"),
        (with_item(2, torch.ones(3, 2).T), {}, r"exp_avgs\[0\] has other strides than params\[0\]"),
        (with_item(0, torch.ones(2, 6)[:, ::2]), {}, r"params\[0\] has gaps or overlaps in memory"),
        (with_item(0, torch.ones(1, 3).expand(2, 3)), {}, r"params\[0\] has gaps or overlaps"),
        (with_item(5, torch.ones(2)), {}, r"state_steps\[0\] has 2 elements; it needs 1"),
        (with_item(5, torch.tensor(1)), {}, r"state_steps\[0\] has dtype int64; it needs float32"),
        ([*arguments([(2, 3)])[:5], []], {}, "state_steps has 0 tensors; it needs 1"),
        (with_item(4, ONE), {}, "max_exp_avg_sqs has 1 tensors; it needs 0"),
        (arguments([(2, 3)]), {"amsgrad": True}, "max_exp_avg_sqs has 0 tensors; it needs 1"),
        (arguments(), {"lr": -0.5}, "lr has the value -0.5; it needs one of at least 0"),
        (arguments(), {"lr": float("nan")}, "lr has the value nan"),
        (arguments(), {"beta1": 1.0}, r"beta1 has the value 1; it needs one in \[0, 1\)"),
        (arguments(), {"beta2": -0.1}, r"beta2 has the value -0.1; it needs one in \[0, 1\)"),
        (arguments(), {"eps": -1.0}, "eps has the value -1; it needs one of at least 0"),
        (arguments(), {"weight_decay": -1.0}, "weight_decay has the value -1; it needs one of"),
        (arguments(), {"found_inf": torch.ones(2)}, "found_inf has 2 elements; it needs 1"),
        (
            arguments(),
            {"grad_scale": torch.ones(1).double()},
            "grad_scale has dtype float64; it needs float32",
        ),
    ],
)
def test_bad_input_is_refused_by_name_and_changes_nothing(lists, settings, message):
    before = clones(lists)
    with pytest.raises(RuntimeError, match=f"^adam_: {message}"):
        adam_(*lists, **{**SETTINGS, **settings})
    assert_equal(lists, before)


@pytest.mark.skipif("cuda" not in devices(), reason="needs a second device")
def test_another_device_is_refused_by_name():
    lists = list(arguments([(2, 3)], device="cuda"))
    lists[5] = [torch.zeros(())]
    with pytest.raises(RuntimeError, match=r"state_steps\[0\] and params\[0\] are on different"):
        adam_(*lists, **SETTINGS)


def test_no_parameters_is_no_error():
    adam_([], [], [], [], [], [], **SETTINGS)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_a_copy_takes_the_place_of_two_casts(device, amsgrad, lower):
    if lower not in dtypes(device):
        pytest.skip(f"no {lower} on the {device}")
    mixed = arguments(device=device, amsgrad=amsgrad)
    cast = clones(mixed)
    copies = [torch.empty_like(p, dtype=lower) for p in mixed[0]]
    for i, grad in enumerate(mixed[1]):
        mixed[1][i] = grad.to(lower)
        cast[1][i] = mixed[1][i].float()
    copies[2] = torch.empty(0, dtype=lower, device=device)  # this one has a float32 gradient
    mixed[1][2] = cast[1][2]
    adam_(*mixed, copies, **SETTINGS, amsgrad=amsgrad)
    adam_(*cast, **SETTINGS, amsgrad=amsgrad)
    assert_equal([mixed[0], *mixed[2:]], [cast[0], *cast[2:]])
    for i, written in enumerate(copies):
        assert i == 2 or torch.equal(written, cast[0][i].to(lower))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grads, copies: copies.pop(), "copies has 5 tensors; it needs 6"),
        (lambda grads, copies: copies.__setitem__(4, copies[4][1:]), r"copies\[4\] has shape"),
        (lambda grads, copies: grads.__setitem__(4, grads[4].float()), "belongs to a float32"),
        (lambda grads, copies: copies.__setitem__(4, copies[4].double()), r"copies\[4\] has dtype"),
        (lambda grads, copies: copies.__setitem__(3, copies[3].t().contiguous().t()), "strides"),
    ],
)
def test_copies_that_do_not_fit_are_named(change, message):
    lists = arguments()
    lists[1][:] = [grad.bfloat16() for grad in lists[1]]
    copies = [p.bfloat16() for p in lists[0]]
    change(lists[1], copies)
    with pytest.raises(RuntimeError, match=f"^adam_: .*{message}"):
        adam_(*lists, copies, **SETTINGS)
