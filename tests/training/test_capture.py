"""A captured step: the eager one's bits, whatever happens between two steps."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skinfast.models import build_model
from skinfast.nn import CrossEntropyLoss
from skinfast.optim import Adam
from skinfast.training import TrainConfig, TrainStep, load_model, train
from skinfast.training.capture import CapturedStep, LowPrecisionCopies

CASES = [
    ("cnn", 32, "float32"),
    ("cnn", 32, "bfloat16"),
    ("logistic-regression", 8, "float32"),
    ("logistic-regression", 8, "bfloat16"),
    ("resnet50", 32, "float32"),
    ("resnet50", 32, "bfloat16"),
]


def batch(model, size, seed, images=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, size, size, generator=generator)
    if model == "resnet50":
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.randint(0, 7, (images,), generator=generator)


def steps(model, size, precision):
    """An eager step and a captured one, on equal models."""
    torch.manual_seed(0)
    first = build_model(model, image_size=size)
    return [
        TrainStep(
            module,
            Adam(module.parameters(), lr=1e-3, weight_decay=0.01),
            CrossEntropyLoss(label_smoothing=0.1),
            device=torch.device("cpu"),
            precision=precision,
            capture=capture,
        )
        for module, capture in ((first, False), (copy.deepcopy(first), True))
    ]


def assert_equal_bits(eager, captured):
    ours, theirs = captured.model.state_dict(), eager.model.state_dict()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    for mine, other in zip(
        captured.optimizer.state_dict()["state"].values(),
        eager.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(mine[key], other[key]) for key in other)
    assert captured.take_totals() == eager.take_totals()


@pytest.mark.parametrize(("model", "size", "precision"), CASES)
def test_equals_the_eager_step_bit_for_bit(model, size, precision):
    pair = steps(model, size, precision)
    for step in pair:
        for seed in range(5):
            step(*batch(model, size, seed))
    assert_equal_bits(*pair)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_shapes_take_turns(precision):
    pair = steps("cnn", 32, precision)
    for step in pair:
        for seed in range(9):  # each shape recorded and replayed, between the other's
            step(*batch("cnn", 32, seed, images=4 if seed % 3 == 2 else 6))
    assert_equal_bits(*pair)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_follows_what_changes_between_steps(precision):
    pair = steps("cnn", 32, precision)
    for step in pair:
        for seed in range(3):
            step(*batch("cnn", 32, seed))
        for group in step.optimizer.param_groups:
            group["lr"] = 5e-4
        step(*batch("cnn", 32, 3))
        with torch.no_grad():
            for parameter in step.model.parameters():
                parameter.mul_(0.9)
        step(*batch("cnn", 32, 4))
        step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        for seed in range(5, 9):
            step(*batch("cnn", 32, seed))
    assert_equal_bits(*pair)


def test_parameters_of_several_groups_keep_their_learning_rates():
    pair = steps("logistic-regression", 8, "float32")
    for step in pair:
        norm, dense = step.model.norm.parameters(), step.model.fc.parameters()
        step.optimizer = Adam([{"params": norm, "lr": 0.1}, {"params": dense, "lr": 1e-3}])
        for seed in range(4):
            step(*batch("logistic-regression", 8, seed))
        step.optimizer.param_groups[0]["lr"] = 0.0
        step(*batch("logistic-regression", 8, 4))
    assert_equal_bits(*pair)


def test_what_is_frozen_has_no_state():
    pair = steps("cnn", 32, "float32")
    for step in pair:
        step.model.fc1.requires_grad_(False)
        for seed in range(2):
            step(*batch("cnn", 32, seed))
    assert len(pair[1]._captured) == 1 and pair[1].model.fc1.weight not in pair[1].optimizer.state
    assert_equal_bits(*pair)


def test_another_optimizer_is_refused():
    model = build_model("cnn", image_size=32)
    with pytest.raises(
        TypeError, match=r"capture needs skinfast\.optim\.Adam; the optimizer is SGD"
    ):
        TrainStep(
            model,
            torch.optim.SGD(model.parameters()),
            CrossEntropyLoss(),
            device=torch.device("cpu"),
            precision="float32",
            capture=True,
        )


class Calls(TorchDispatchMode):
    """Counts the calls of ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))

    def count(self, op):
        return self.calls.count(op)


def test_casts_of_weights_are_folded_into_adam():
    _, captured = steps("resnet50", 32, "bfloat16")
    for seed in range(2):
        captured(*batch("resnet50", 32, seed))
    (recording,) = captured._captured.values()
    convolutions = sum(p.dim() == 4 for p in captured.model.parameters())
    assert len(recording._copied) == convolutions + 2  # and the dense layer's two
    with Calls() as calls:
        captured(*batch("resnet50", 32, 2))
    assert calls.count(torch.ops.skinfast.conv2d.default) == convolutions
    assert calls.count(torch.ops.aten._to_copy.default) <= 4  # images, logits and back, the loss


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_that_meet_at_a_shortcut_are_added_by_what_reads_them(precision):
    _, captured = steps("resnet50", 32, precision)
    captured(*batch("resnet50", 32, 0))
    with Calls() as calls:
        captured(*batch("resnet50", 32, 1))
    assert calls.count(torch.ops.skinfast.batch_norm_add_relu_backward.default) == 16
    assert calls.count(torch.ops.aten.add.Tensor) == 1  # that of the stem's output


def read_twice(a, b, out):
    total = a + b
    out.copy_(total)
    return total


@pytest.mark.parametrize(
    ("total", "joined"),
    [
        (lambda a, b, out: a + b, True),
        (lambda a, b, out: torch.add(a, b, alpha=2), False),
        (lambda a, b, out: a + b[:1], False),
        (lambda a, b, out: a + 1, False),
        (read_twice, False),
    ],
)
def test_only_a_plain_sum_of_two_gradients_is_left_to_what_reads_it(total, joined):
    optimizer = Adam([torch.zeros(3, requires_grad=True)])
    optimizer.make_states()
    statistics = torch.ones(3), torch.ones(3)
    backward = torch.ops.skinfast.batch_norm_add_relu_backward
    copy_of_sum, found = torch.zeros(2, 3), torch.zeros(2, 3)

    def step(a, b, x):
        mask = torch.full((1,), 0b101101, dtype=torch.uint8)
        grads = backward(total(a, b, copy_of_sum), x, mask, *statistics, None, True, 1e-5)
        found.copy_(grads[0])
        optimizer.param_groups[0]["params"][0].grad = grads[2]
        optimizer.step()

    inputs = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)
    step(*inputs)
    expected = found.clone()
    recorded = CapturedStep(step, inputs, optimizer, LowPrecisionCopies())
    found.zero_()
    with Calls() as calls:
        recorded.replay(*inputs)
    assert torch.equal(found, expected)
    assert (calls.count(torch.ops.aten.add.Tensor) == 0) == joined


class Counting(torch.nn.Linear):
    """Counts its calls: one count is read in between, one by a view, one counts twice."""

    def __init__(self):
        super().__init__(12, 7)
        for name in ("calls", "read", "viewed", "twice"):
            self.register_buffer(name, torch.tensor(0))

    def forward(self, x):
        self.calls.add_(1)
        self.read.add_(1)
        self.viewed.add_(1)
        self.twice.add_(1).add_(1)
        return super().forward(x.flatten(1)) * self.read + self.viewed.view(1)


def test_counts_of_a_step_are_joined_in_one_call():
    _, captured = steps("resnet50", 32, "float32")
    for seed in range(3):
        captured(*batch("resnet50", 32, seed))
    with Calls() as calls:
        captured(*batch("resnet50", 32, 3))
    assert calls.count(torch.ops.aten._foreach_add_.Scalar) == 1
    assert calls.count(torch.ops.aten.add_.Tensor) == 0
    counts = [b for name, b in captured.model.named_buffers() if "num_batches" in name]
    assert len(counts) == 53 and all(count == 4 for count in counts)


def test_a_count_that_is_read_is_left_where_it_is():
    model = Counting()
    step = TrainStep(model, Adam(model.parameters()), CrossEntropyLoss(),
                     device=torch.device("cpu"), precision="float32", capture=True)  # fmt: skip
    other = copy.deepcopy(model)
    eager = TrainStep(other, Adam(other.parameters()), CrossEntropyLoss(),
                      device=torch.device("cpu"), precision="float32")  # fmt: skip
    for seed in range(4):
        for each in (step, eager):
            each(*batch("cnn", 2, seed))
    assert model.calls == model.read == 4 and model.twice == 8
    assert_equal_bits(eager, step)
    with Calls() as calls:
        step(*batch("cnn", 2, 4))
    assert calls.count(torch.ops.aten._foreach_add_.Scalar) == 1
    assert calls.count(torch.ops.aten.add_.Tensor) == 4


SETTINGS = [
    {"lr_schedule": "cosine", "warmup_epochs": 0.5, "ema_decay": 0.9, "rotate": True},
    {"lr_schedule": "one-cycle", "loss": "focal", "class_weights": True, "color_jitter": 0.2},
    {"lr_schedule": "step", "lr_step_epochs": 1, "weight_decay": 0.1, "ema_decay": 0.99,
     "decoupled_weight_decay": True, "balanced_batches": True, "augment": True},
    {"validation_fraction": 0.2, "patience": 1, "class_weights": True, "label_smoothing": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["cnn", "logistic-regression"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
def test_no_setting_of_training_escapes_a_replay(
    small_data, tmp_path, monkeypatch, model, precision, settings
):
    config = TrainConfig(data=str(small_data), model=model, image_size=32, epochs=3, batch_size=16,
                         lr=0.01, device="cpu", precision=precision, **settings)  # fmt: skip
    replayed = []
    replay = CapturedStep.replay
    monkeypatch.setattr(CapturedStep, "replay", lambda *args: (replayed.append(1), replay(*args)))
    captured = train(config, tmp_path / "captured")
    assert len(replayed) > 4
    monkeypatch.setattr(
        "skinfast.training.loop.TrainStep",
        lambda *args, capture, **options: TrainStep(*args, **options),
    )
    replayed.clear()
    eager = train(config, tmp_path / "eager")
    assert not replayed
    ours, theirs = (load_model(run.model_file)[0].state_dict() for run in (captured, eager))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    for mine, other in zip(captured.read_metrics(3), eager.read_metrics(3), strict=True):
        for key in other.keys() - {"seconds", "images_per_second"}:
            assert mine[key] == other[key], key
