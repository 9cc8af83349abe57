"""Adam against torch.optim.Adam: its results, its state, and all that is used around it."""

import copy
import io
import itertools
import pickle

import pytest
import torch

from skinfast.optim import Adam
from skinfast.testing import devices

SHAPES = [(), (0, 4), (7,), (8, 3, 3, 3), (65, 33)]
LR = 0.5**10  # exact in float32, so that a tensor of it says the same


def twins(device="cpu", dtype=torch.float32, shapes=SHAPES):
    """Two equal lists of parameters; the 4-d ones are stored channels_last."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    values = [
        v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for v in values
    ]
    return tuple([v.to(device, dtype, copy=True).requires_grad_() for v in values] for _ in "ab")


def feed(ours, theirs, seed, scale=1.0):
    """Equal gradients for both; ours contiguous whatever the parameter's layout, or strided.

    Theirs lie as the parameter does: torch's fused Adam on the CPU pairs elements by their place in
    memory without a look at the strides.
    """
    generator = torch.Generator().manual_seed(seed)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        grad = torch.randn(a.shape, generator=generator, dtype=torch.float64).to(a) * scale
        b.grad = torch.empty_like(b, requires_grad=False).copy_(grad)
        a.grad = torch.stack([grad, grad], dim=-1)[..., 0] if i % 2 else grad


def train(ours, theirs, params, steps, seed=0):
    for i in range(steps):
        feed(*params, seed=seed + i)
        ours.step()
        theirs.step()


def assert_same(params, steps, lr=LR):
    """Within 1e-6 of the value or of the way it has come, which is lr a step."""
    for a, b in zip(*params, strict=True):
        if a.dtype == torch.float64:
            torch.testing.assert_close(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * lr * steps)


GRID = list(itertools.product([0.0, 0.0625], *[[False, True]] * 4))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("weight_decay", "amsgrad", "maximize", "decoupled", "tensor"), GRID)
def test_a_hundred_steps_are_torchs(
    device, dtype, weight_decay, amsgrad, maximize, decoupled, tensor
):
    settings = {
        "lr": torch.tensor(LR, dtype=dtype) if tensor else LR,
        "weight_decay": weight_decay,
        "amsgrad": amsgrad,
        "maximize": maximize,
        "decoupled_weight_decay": decoupled,
    }
    params = twins(device, dtype)
    ours = Adam(params[0], **settings)
    theirs = torch.optim.Adam(params[1], foreach=False, **settings)
    train(ours, theirs, params, 100)
    assert_same(params, 100)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.3, 0.5), (0.9, 0.0)])
def test_any_betas_are_torchs(device, betas):
    params = twins(device, torch.float64)
    ours = Adam(params[0], lr=LR, betas=betas, eps=1e-3)
    theirs = torch.optim.Adam(params[1], lr=LR, betas=betas, eps=1e-3)
    train(ours, theirs, params, 20)
    assert_same(params, 20)


def copied(state_dict):
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("fused", [None, True])
def test_state_dicts_go_both_ways_in_the_middle_of_a_run(device, amsgrad, fused):
    params = twins(device)
    settings = {"lr": LR, "weight_decay": 0.0625, "amsgrad": amsgrad}
    ours, theirs = Adam(params[0], **settings), torch.optim.Adam(params[1], fused=fused, **settings)
    train(ours, theirs, params, 10)

    first, second = ours.state_dict(), theirs.state_dict()
    assert first["state"].keys() == second["state"].keys()
    for i, state in first["state"].items():
        assert state.keys() == second["state"][i].keys()
        for name, value in state.items():
            assert value.dtype == second["state"][i][name].dtype
            assert value.stride() == second["state"][i][name].stride()
    assert first["param_groups"][0].keys() == second["param_groups"][0].keys()

    # Each goes on with the other's state and with settings that the state overrides.
    crossed = Adam(params[0], lr=0.5), torch.optim.Adam(params[1], lr=0.5)
    crossed[0].load_state_dict(copied(second))
    crossed[1].load_state_dict(copied(first))
    train(*crossed, params, 10, seed=10)
    assert_same(params, 20)
    for a, b in zip(*params, strict=True):
        assert crossed[0].state[a]["step"].item() == crossed[1].state[b]["step"].item() == 20
        assert crossed[0].state[a]["step"].device == a.device


def test_a_state_of_another_layout_and_an_old_state_are_taken_over():
    (contiguous,), (channels_last,) = (
        [torch.ones(2, 3, 4, 5, requires_grad=True)],
        [torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()],
    )
    first, second = torch.optim.Adam([contiguous]), Adam([channels_last])
    train(second, first, ([channels_last], [contiguous]), 1)
    state_dict = copied(first.state_dict())
    state_dict["state"][0]["step"] = 1.0  # a number in old checkpoints
    for name in ("amsgrad", "maximize", "decoupled_weight_decay", "fused"):
        del state_dict["param_groups"][0][name]
    second.load_state_dict(state_dict)
    train(second, first, ([channels_last], [contiguous]), 3, seed=1)
    assert_same(([channels_last], [contiguous]), 4, lr=1e-3)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_as_the_original(copy_of):
    params = twins()
    ours = Adam(params[0], lr=LR)
    train(ours, torch.optim.Adam(params[1], lr=LR), params, 3)
    other = copy_of(ours)
    assert other._step_supports_amp_scaling
    others = other.param_groups[0]["params"]
    feed(params[0], others, seed=7)
    ours.step()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(params[0], others, strict=True))


def test_groups_have_settings_of_their_own():
    params = twins()
    groups = [
        [
            {"params": p[:2], "lr": 4 * LR},
            {"params": p[2:4], "betas": (0.5, 0.9), "weight_decay": 0.1},
        ]
        for p in params
    ]
    ours, theirs = Adam(groups[0], lr=LR), torch.optim.Adam(groups[1], lr=LR)
    train(ours, theirs, params, 3)
    for optimizer, p in zip((ours, theirs), params, strict=True):
        optimizer.add_param_group({"params": p[4:], "amsgrad": True})
    train(ours, theirs, params, 10)
    assert_same(params, 13)


def test_parameters_without_a_gradient_are_passed_over():
    params = twins()
    ours, theirs = Adam(params[0], lr=LR), torch.optim.Adam(params[1], lr=LR)
    train(ours, theirs, params, 2)
    for p in params:
        p[3].grad = None
        p[4].grad = None
    before = params[0][4].clone()
    ours.step()
    theirs.step()
    assert torch.equal(params[0][4], before)
    assert ours.state[params[0][4]]["step"].item() == 2
    assert ours.state[params[0][2]]["step"].item() == 3
    assert_same(params, 3)
    ours.zero_grad()
    assert all(p.grad is None for p in params[0])
    ours.step()


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    weight = torch.ones(3, requires_grad=True)
    optimizer = Adam([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] == 3.0 and losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers_drive_the_learning_rate(tensor):
    params = twins()
    optimizers = []
    for make, p in zip((Adam, torch.optim.Adam), params, strict=True):
        optimizers.append(make(p, lr=torch.tensor(LR) if tensor else LR))
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in optimizers]
    for i in range(6):
        train(*optimizers, params, 1, seed=i)
        for scheduler in schedulers:
            scheduler.step()
    assert float(optimizers[0].param_groups[0]["lr"]) == LR / 8
    assert_same(params, 6)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("unscale", [False, True])
def test_works_with_a_grad_scaler_as_torchs_fused_adam(device, unscale):
    params = twins(device)
    optimizers = Adam(params[0], lr=LR), torch.optim.Adam(params[1], lr=LR, fused=True)
    scalers = [torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=3) for _ in "ab"]
    for i in range(8):
        for scaler in scalers:
            scaler.scale(torch.ones((), device=device))  # makes the scale
        feed(*params, seed=i, scale=scalers[0].get_scale())
        if i == 4:
            for p in params:
                p[2].grad[0] = float("inf")
        before = copy.deepcopy(optimizers[0].state_dict()["state"]), [p.clone() for p in params[0]]
        for scaler, optimizer in zip(scalers, optimizers, strict=True):
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        if i == 4:  # the step was skipped: nothing has changed
            after = optimizers[0].state_dict()["state"]
            for j, state in before[0].items():
                assert all(torch.equal(value, after[j][name]) for name, value in state.items())
            assert all(torch.equal(a, b) for a, b in zip(before[1], params[0], strict=True))
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert optimizers[0].state[params[0][0]]["step"].item() == 7
    assert_same(params, 7)


@pytest.mark.skipif("cuda" not in devices(), reason="needs a GPU")
def test_a_cuda_graph_of_steps_is_equal_to_steps():
    graphed, eager = twins("cuda")
    lr = torch.tensor(LR, device="cuda")
    optimizers = Adam(graphed, lr=lr, capturable=True), Adam(eager, lr=lr)
    train(*optimizers, (graphed, eager), 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for value in (LR, LR / 4, LR / 8):
        lr.fill_(value)
        graph.replay()
        optimizers[1].step()
    assert all(torch.equal(a, b) for a, b in zip(graphed, eager, strict=True))


@pytest.mark.skipif("cuda" not in devices(), reason="needs a GPU")
def test_parameters_may_be_on_two_devices():
    (first, _), (second, _) = twins("cpu"), twins("cuda")
    together, alone = copy.deepcopy(first), first
    mixed = Adam([*together, *second], lr=LR)
    single = Adam(alone, lr=LR)
    feed(together, alone, seed=0)
    feed(second, second, seed=0)
    mixed.step()
    single.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0; it needs to be at least 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": torch.ones(2)}, "lr has 2 elements; a tensor lr needs 1"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0; it needs to be in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1; it needs to be in \[0, 1\)"),
        ({"eps": -1.0}, "eps is -1.0; it needs to be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it needs to be at least 0"),
        ({"differentiable": True}, "differentiable=True is not supported; use torch.optim.Adam"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Adam([torch.ones(1, requires_grad=True)], **settings)
    with pytest.raises(ValueError, match=message):
        Adam([{"params": [torch.ones(1, requires_grad=True)], **settings}])


def test_sparse_gradients_and_complex_parameters_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients; use torch"):
        Adam(embedding.parameters()).step()
    parameter = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="does not support complex parameters"):
        Adam([parameter]).step()


@pytest.mark.parametrize("settings", [{"foreach": True}, {"fused": False}, {"capturable": True}])
def test_torchs_switches_between_implementations_are_accepted(settings):
    params = twins()
    train(Adam(params[0], lr=LR, **settings), torch.optim.Adam(params[1], lr=LR), params, 2)
    assert_same(params, 2)
