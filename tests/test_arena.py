"""Arenas: where tensors lie, what a model keeps on its way there, and that no bit changes."""

import contextlib
import copy
import io
import itertools
from unittest import mock

import pytest
import torch
from torch import nn

from skinfast import arena
from skinfast.models import build_model
from skinfast.models.resnet import ResNet
from skinfast.nn import CrossEntropyLoss
from skinfast.optim import Adam
from skinfast.testing import devices
from skinfast.training import TrainStep, load_model, save_model
from skinfast.training.averaging import MovingAverage
from skinfast.training.model_file import ModelDescription

MODELS = {
    "cnn": lambda: build_model("cnn", image_size=32),
    "logistic-regression": lambda: build_model("logistic-regression", image_size=32),
    # ResNet-50 with one block in each stage; its weights are stored channels_last.
    "resnet": lambda: ResNet((1, 1, 1, 1), 7, "skinfast"),
}


@contextlib.contextmanager
def no_arenas():
    """Every tensor with memory of its own."""

    def apart(tensors, dtypes=None):
        dtypes = dtypes or [tensor.dtype for tensor in tensors]
        return [torch.zeros_like(t, dtype=d) for t, d in zip(tensors, dtypes, strict=True)]

    with (
        mock.patch("skinfast.arena.zeros_like", apart),
        mock.patch("skinfast.arena.lay_out", lambda model: None),
    ):
        yield


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


# --- where the tensors lie ------------------------------------------------------------------------


@pytest.mark.parametrize("device", devices())
def test_tensors_lie_apart_and_aligned_in_one_storage_of_each_dtype(device):
    like = [
        torch.ones(3, 5),
        torch.ones(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
        torch.ones(()),
        torch.ones(0, 4),
        torch.ones(4, 6, dtype=torch.float64).t(),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, 1).expand(3, 4),  # not dense
        torch.ones(7, 2)[:, 1],  # nor this
    ]
    like = [tensor.to(device) for tensor in like]
    made = arena.zeros_like(like)
    alignment = 64 if device == "cpu" else 256
    taken = []
    for wanted, tensor in zip(like, made, strict=True):
        expected = torch.zeros_like(wanted)
        assert torch.equal(tensor, expected) and tensor.stride() == expected.stride()
        assert (tensor.dtype, tensor.device) == (wanted.dtype, wanted.device)
        assert tensor.data_ptr() % alignment == 0
        if tensor.numel():
            taken.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
    taken.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(taken))
    assert len(storages(made)) == 3

    for i, tensor in enumerate(made):
        tensor.fill_(i)
    for i, tensor in enumerate(made):
        assert (tensor == i).all()
    versions = [tensor._version for tensor in made]
    made[0].add_(1)
    assert [tensor._version - v for tensor, v in zip(made, versions, strict=True)] == [1] + [0] * 7


def test_the_dtypes_may_be_others():
    like = [torch.ones(3), torch.ones(2, 2, dtype=torch.float64), torch.ones(5)]
    made = arena.zeros_like(like, [torch.bfloat16, torch.bfloat16, torch.float32])
    assert [tensor.dtype for tensor in made] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert len(storages(made)) == 2
    assert arena.zeros_like([]) == []


@pytest.mark.parametrize("device", devices())
def test_flat_is_the_memory_of_tensors_each_piece_once(device):
    alone = torch.ones(2, 3, device=device)
    together = arena.zeros_like([torch.ones(5, device=device), torch.ones(4, 4, device=device)])
    pieces = arena.flat([together[1], alone, together[0], alone])
    step = 16 if device == "cpu" else 64
    assert [piece.shape for piece in pieces] == [(2 * step,), (6,)]
    pieces[0].fill_(7)
    assert all((tensor == 7).all() for tensor in together) and (alone == 1).all()


# --- a model on its way ---------------------------------------------------------------------------


def step_of(model, precision="float32", capture=False):
    return TrainStep(
        model,
        Adam(model.parameters(), lr=1e-3, weight_decay=0.01),
        CrossEntropyLoss(label_smoothing=0.1),
        device=torch.device("cpu"),
        precision=precision,
        capture=capture,
    )


def batch(seed, images=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, 32, 32, generator=generator)
    return (
        x.contiguous(memory_format=torch.channels_last),
        torch.randint(0, 7, (images,), generator=generator),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_moves_in_stays_the_same_model(name):
    model = MODELS[name]()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {key: (t, t.detach().clone(), t.stride()) for key, t in tensors.items()}
    arena.lay_out(model)
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, (tensor, value, strides) in before.items():
        assert now[key] is tensor
        assert torch.equal(tensor, value) and tensor.stride() == strides
    assert len(storages(model.parameters())) == 1
    assert len(storages(model.buffers())) == len({b.dtype for b in model.buffers()})
    places = [t.data_ptr() for t in now.values()]
    arena.lay_out(model)
    assert [t.data_ptr() for t in now.values()] == places


def test_optimizer_hooks_gradients_and_tied_layers_go_on():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    optimizer = Adam(model.parameters(), lr=0.1)
    seen = []
    first.weight.register_hook(seen.append)
    model(torch.ones(2, 4)).sum().backward()
    twin = copy.deepcopy(model)
    twin_optimizer = Adam(twin.parameters(), lr=0.1)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = parameter.grad.clone()
    arena.lay_out(model)
    assert first.weight is second.weight and len(list(model.parameters())) == 3
    assert len(arena.flat(model.parameters())) == 1
    optimizer.step()
    twin_optimizer.step()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other)
    model(torch.ones(2, 4)).sum().backward()
    assert len(seen) == 2
    # A graph that saved one parameter does not mind that another one changes.
    loss = model[0](torch.ones(1, 4, requires_grad=True)).sum()
    with torch.no_grad():
        model[1].bias.add_(1)
    loss.backward()


def test_copies_and_conversions_leave_the_arena():
    model = MODELS["logistic-regression"]()
    arena.lay_out(model)
    copied = copy.deepcopy(model)
    assert not storages(copied.parameters()) & storages(model.parameters())
    sizes = {t.untyped_storage().nbytes() for t in copied.parameters()}
    assert sizes == {t.nbytes for t in copied.parameters()}
    with torch.no_grad():
        copied.fc.bias.fill_(3)
    assert not (model.fc.bias == 3).any()
    weight = model.fc.weight.detach().clone()
    model.to(torch.float64)
    assert torch.equal(model.fc.weight, weight.double())


@pytest.mark.parametrize("name", MODELS)
def test_files_of_a_model_in_arenas_hold_every_value_once(name, tmp_path):
    plain, model = MODELS[name](), MODELS[name]()
    model.load_state_dict(plain.state_dict())
    arena.lay_out(model)
    sizes = []
    for module in (plain, model):
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        sizes.append(file.tell())
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        for key, value in plain.state_dict().items():
            assert torch.equal(loaded[key], value)
            assert loaded[key].stride() == value.stride()
    padding = 64 * len(plain.state_dict())
    assert sizes[1] <= sizes[0] + padding
    if name != "resnet":
        description = ModelDescription(name, 32, tuple("abcdefg"), (0.5,) * 3, (0.5,) * 3)
        for module, file_name in ((plain, "plain"), (model, "laid out")):
            save_model(tmp_path / file_name, module, description)
        assert (tmp_path / "plain").read_bytes() == (tmp_path / "laid out").read_bytes()
        assert load_model(tmp_path / "laid out")[1] == description


# --- training -------------------------------------------------------------------------------------


def trained(name, precision, capture):
    """Everything after six steps, with a checkpoint loaded into new objects after three."""
    state = None
    for seeds in (range(3), range(3, 6)):
        torch.manual_seed(0)
        model = MODELS[name]()
        arena.lay_out(model)
        step = step_of(model, precision, capture)
        average = MovingAverage(model, 0.9)
        parts = (model, step.optimizer, average)
        if state is not None:
            for part, values in zip(parts, torch.load(state, weights_only=True), strict=True):
                part.load_state_dict(values)
        for seed in seeds:
            step(*batch(seed))
            average.update_parameters(model)
        state = io.BytesIO()
        torch.save([part.state_dict() for part in parts], state)
        state.seek(0)
    return parts, torch.load(state, weights_only=True), step.take_totals()


def assert_same_bits(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other) and one.stride() == other.stride()
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same_bits(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_training_has_the_same_bits_without_arenas(name, precision, capture):
    (model, optimizer, _), *ours = trained(name, precision, capture)
    with no_arenas():
        (apart, *_), *theirs = trained(name, precision, capture)
    assert_same_bits(ours, theirs)
    assert len(storages(model.parameters())) == 1 < len(storages(apart.parameters()))
    for state in ("step", "exp_avg", "exp_avg_sq"):  # as the checkpoint's file had them
        assert len(storages(optimizer.state[p][state] for p in model.parameters())) == 1


def test_low_precision_copies_lie_in_an_arena():
    step = step_of(MODELS["cnn"](), "bfloat16", capture=True)
    for seed in range(3):
        step(*batch(seed))
    copies = list(step._copies._copies.values())
    assert len(copies) > 1 and len(storages(copies)) == 1
    for parameter, value in step._copies._copies.items():
        assert torch.equal(parameter.detach().to(torch.bfloat16), value)
