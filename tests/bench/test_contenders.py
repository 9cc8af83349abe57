"""Both sides of every benchmark compute the same, in every mode."""

import itertools
from functools import partial
from types import SimpleNamespace

import bench_models
import bench_ops
import pytest
import torch
from harness import ResultsDifferError, Row, Timing
from trainers import PyTorch, Skinfast, Update, assert_same_training, assert_same_updates

from skinfast.training import TrainConfig, prepare

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", bench_ops.op_names())
def test_every_layout_and_mode_of_an_op_computes_the_same(name):
    op = bench_ops.load(name)
    for dtype, direction in itertools.product(op.dtypes, op.passes):
        call = (list(op.cases)[-1], dtype, direction, CPU)
        calls = {layout: op.build(*call, True, layout) for layout in op.layouts}
        calls |= {f"PyTorch {mode}": op.build(*call, False, mode) for mode in op.modes}
        bench_ops.assert_equal(bench_ops.TOLERANCES[dtype], calls)
        work = op.work_of(*call[:3])
        assert work.bytes > 0 and work.flops > 0


def test_a_different_result_is_found():
    calls = {"a": lambda: (torch.ones(3),), "b": lambda: (torch.full((3,), 1.01),)}
    with pytest.raises(AssertionError, match=r"result 0 of a is off by 0.0099"):
        bench_ops.assert_equal(1e-3, calls)


def test_an_op_that_differs_is_named_and_the_others_are_timed(monkeypatch):
    timed, notes = [], []

    def call(op, case, *_):
        timed.append((op.name, case))
        if op.name == "add_relu":
            raise ResultsDifferError("add_relu: results differ")

    monkeypatch.setattr(bench_ops, "bench_call", call)
    report = type("Report", (), {"note": lambda self, line: notes.append(line)})()
    found = [
        bench_ops.bench_op(name, None, report, None, True) for name in ("add_relu", "linear_relu")
    ]
    assert found == ["add_relu: results differ", ""]
    assert notes == ["add_relu: results differ"]
    assert [name for name, _ in timed] == ["add_relu", "linear_relu", "linear_relu"]


@pytest.fixture
def problem(small_data):
    return prepare(TrainConfig(data=str(small_data), image_size=32, batch_size=16, device="cpu"))


def test_an_epoch_is_compared_with_a_mode_without_a_compiler_too(monkeypatch):
    """Only of such a mode is the memory measured."""
    seconds = {("contiguous", True): 1.0, ("channels_last", False): 2.0}  # the others take longer
    epochs = []

    def compare_step(problem, bench, fused, modes):
        names = {bench_models.pytorch_name(*m, fused): seconds.get(m, 3.0) for m in modes}
        return Row("", min(names, key=names.get), Timing([1e-3]), Timing([1e-3]), names, None, None)

    monkeypatch.setattr(bench_models, "compare_step", compare_step)
    monkeypatch.setattr(bench_models, "compare_epoch", lambda *args: epochs.append(set(args[-1])))
    monkeypatch.setattr(bench_models.ModelsBench, "_add", lambda *_: None)
    few = {"model": ["cnn"], "precision": ["float32"], "batch_size": 64}
    whole = {"quick": False, "eager": False, "steps": False, "compile_mode": None}
    options = SimpleNamespace(data="synthetic", device="cpu", **few, **whole)
    models = bench_models.ModelsBench(options, None, SimpleNamespace(header=lambda *_: None))
    models.fused["cnn", "float32"] = True
    models.steps()
    assert epochs == [set(seconds)] * 2


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_both_sides_train_alike(problem, layout):
    trainers = {"ours": Skinfast(problem), "torch": PyTorch(problem, layout, False, fused=True)}
    assert_same_training(problem, 1e-3, trainers)
    for trainer in trainers.values():
        trainer()
        trainer.take_loss()
        assert trainer.epoch() > 0


def test_another_training_is_found(problem):
    trainers = {"ours": Skinfast(problem), "torch": PyTorch(problem, "contiguous", False, False)}
    trainers["torch"].model.fc3.bias.data += 1
    trainers["torch"].model.fc3.weight.data *= -1
    with pytest.raises(AssertionError, match="the loss of step 1 is"):
        assert_same_training(problem, 1e-3, trainers)


def test_updates_are_alike(problem):
    updates = {"ours": Update(problem, True, False)}
    updates |= {str(fused): partial(Update, problem, False, fused)() for fused in (False, True)}
    assert_same_updates(updates)


def test_the_update_of_a_large_model_is_made_in_parts(monkeypatch):
    """Its gradients are inputs, there before the parameters are."""
    monkeypatch.setattr("skinfast.training.capture._UPDATE_BYTES", 2**12)
    config = TrainConfig(model="cnn", data="synthetic", image_size=32, device="cpu")
    problem = prepare(config)
    updates = {"ours": Update(problem, True, False), "PyTorch's": Update(problem, False, True)}
    assert_same_updates(updates)
