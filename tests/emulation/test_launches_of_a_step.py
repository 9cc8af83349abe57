"""How many launches a training step on a GPU is made of, by a dry run of the emulation.

A step of an epoch's graph: clock, rates, fetch, forward, loss, backward, Adam, sums. The kernels of
skinfast are counted where they are launched; of PyTorch's functions, how often one is called that
computes something. docs/performance.md has the figures.
"""

import ctypes
from contextlib import nullcontext

import emulated
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skinfast.models import build_model
from skinfast.nn import CrossEntropyLoss
from skinfast.optim import Adam
from skinfast.training import TrainConfig, TrainStep, prepare
from skinfast.training.capture import _Recording

# Of the batch and the memory format that a GPU's training has.
BATCH = 64
ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")


class Launches(TorchDispatchMode):
    """Sends skinfast's ops to the dry emulation; counts its launches and PyTorch's functions."""

    def __init__(self, launches):
        super().__init__()
        self._launches = launches
        self.ours = self.pytorch = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if func.namespace != "skinfast":
            moves_nothing = func.is_view or name in ALLOCATIONS or name == "aten::detach"
            self.pytorch += not moves_nothing
            return func(*args, **(kwargs or {}))
        packet = getattr(torch.ops.skinfast_emulated, name.split("::")[1])
        before = self._launches()
        result = getattr(packet, func._overloadname)(*args, **(kwargs or {}))
        self.ours += self._launches() - before
        return result


class NoGraphs:
    """Stands in for CUDA graphs; keeps what the first of them records, a step with a full batch."""

    step = None

    def active(self):
        return nullcontext()

    def record(self, function):
        self.step = self.step or function
        return function


@pytest.fixture
def launches_of_a_step(emulated_ops, monkeypatch, tmp_path):
    """Of a model, its images' size and precision: skinfast's launches, PyTorch's functions."""
    counter = ctypes.CDLL(str(emulated.build_ops())).emulation_launches
    counter.restype = ctypes.c_int64
    # A CPU's recording divides Adam's update for the cache and has kernels add gradients; a GPU's
    # does neither.
    monkeypatch.setattr(_Recording, "split_updates", lambda self: None)
    monkeypatch.setattr(_Recording, "join_gradients", lambda self: None)

    def count(name, image_size, precision):
        config = TrainConfig(data="synthetic", model=name, image_size=image_size, augment=True,
                             batch_size=BATCH, precision=precision, device="cpu")  # fmt: skip
        problem = prepare(config)
        graphs = NoGraphs()
        model = build_model(name, image_size=image_size)
        step = TrainStep(
            model,
            Adam(model.parameters()),
            CrossEntropyLoss(),
            device=torch.device("cpu"),
            precision=precision,
            capture=True,
            launcher=graphs,
        )
        batches = problem.train_batches(model)
        batches.set_epoch(1)
        step.epoch(batches)
        clock, _ = step._epochs.state()
        clock.zero_()
        monkeypatch.setenv("SKINFAST_EMULATION_DRY", "1")
        with Launches(counter) as mode:
            graphs.step()
        return mode.ours, mode.pytorch

    return count


# PyTorch's: the learning rate, the gradient of the loss, counts of batches, the clock; in bfloat16
# casts of what the loss takes and gives; at ResNet-50's shortcuts the sums of two gradients. Beside
# them, out of sight, are matrix products of dense layers and ResNet-50's 158 of convolutions.
@pytest.mark.parametrize("image_size", [64, 32])
@pytest.mark.parametrize(
    ("model", "precision", "ours", "pytorch"),
    [
        ("cnn", "float32", 19, 3),
        ("cnn", "bfloat16", 19, 5),
        ("logistic-regression", "float32", 10, 4),
        ("logistic-regression", "bfloat16", 10, 8),
        ("resnet50", "float32", 381, 24),
        ("resnet50", "bfloat16", 381, 26),
    ],
)
def test_what_a_step_launches(launches_of_a_step, model, image_size, precision, ours, pytorch):
    """A step that launches more has lost what a fusion gained; one that launches less, say so here
    and in docs/performance.md."""
    assert launches_of_a_step(model, image_size, precision) == (ours, pytorch)
