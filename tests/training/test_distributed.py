"""Two processes on the CPU: the gradients, losses and weights of one, one folder, one line."""

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed

import pytest
import torch
import torch.distributed as dist

from skinfast import cli
from skinfast.errors import SkinfastError
from skinfast.models import build_model
from skinfast.models.resnet import ResNet
from skinfast.nn import CrossEntropyLoss, convert_sync_batch_norm
from skinfast.training import TrainConfig, TrainStep, load_model, train
from skinfast.training.distributed import DistributedStep, Processes, joined, part_of, smallest_part
from skinfast.training.losses import FocalLoss
from tests.test_arena import no_arenas

COUNT = 2

# Process groups of their own, with ports that no other worker may take meanwhile.
pytestmark = pytest.mark.xdist_group("distributed")


def call_as(rank, port, function, arguments):
    """What a function returns as one of the processes that torchrun would start."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": COUNT, "LOCAL_WORLD_SIZE": COUNT,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        return function(*arguments)
    finally:
        for name in names:
            del os.environ[name]
        if dist.is_initialized():  # left behind by a failure
            dist.destroy_process_group()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(COUNT, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def in_two(pool, cache):
    """Call a function in two processes; what each of them returned."""

    def call(function, *arguments):
        port = free_port()
        futures = [pool.submit(call_as, rank, port, function, arguments) for rank in range(COUNT)]
        # The first to fail tells why; the other one's SystemExit does not.
        for future in as_completed(futures, timeout=60):
            future.result()
        return [future.result() for future in futures]

    return call


# --- the parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("smallest", [1, 2])
def test_parts_are_the_batch_in_its_order(smallest):
    for count in range(1, 6):
        for images in range(smallest, 23):
            batch = list(range(images))
            parts = [batch[part_of(images, rank, count, smallest)] for rank in range(count)]
            assert list(itertools.chain(*parts)) == batch
            sizes = [len(part) for part in parts if part]
            assert max(sizes) - min(sizes) <= 1 and min(sizes) >= smallest and parts[0]


def test_a_model_that_normalises_by_its_part_needs_two_images():
    models = [build_model(name, image_size=32) for name in ("cnn", "logistic-regression")]
    assert [smallest_part(model) for model in models] == [1, 2]
    assert smallest_part(convert_sync_batch_norm(models[1], "cpu")) == 1


# --- one step, in float64 -------------------------------------------------------------------------

WEIGHT = torch.tensor([3.0, 0.5, 1.0, 2.0, 0.1, 1.5, 0.7], dtype=torch.float64)
LOSSES = {
    "mean": CrossEntropyLoss(),
    "weighted": CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
    "focal": FocalLoss(2.0, WEIGHT),
}
MODELS = {
    "cnn": lambda: build_model("cnn", image_size=32),
    "logistic-regression": lambda: build_model("logistic-regression", image_size=32),
    # ResNet-50 with one block in each stage.
    "resnet": lambda: ResNet((1, 1, 1, 1), 7, "skinfast"),
}
# The model, images in the batch, loss: equal parts, unequal ones, an empty one.
STEPS = [
    ("cnn", 6, "mean"),
    ("cnn", 7, "weighted"),
    ("cnn", 7, "focal"),
    ("cnn", 1, "mean"),
    ("logistic-regression", 5, "weighted"),
    ("resnet", 5, "mean"),
    ("resnet", 3, "weighted"),
]


def after_a_step(model_name, images, loss, kind):
    torch.manual_seed(0)
    model = MODELS[model_name]().double()
    if kind is DistributedStep:
        convert_sync_batch_norm(model, "cpu")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (images,), generator=generator)
    # Plain gradient descent: a weight's change is its gradient. Adam's has the same size for any.
    step = kind(model, torch.optim.SGD(model.parameters(), lr=0.1), LOSSES[loss],
                device=torch.device("cpu"), precision="float32")  # fmt: skip
    step(x, labels)
    return model.state_dict(), step.take_totals()


def after_steps_together():
    with joined():
        return [after_a_step(*case, DistributedStep) for case in STEPS]


def test_a_step_of_two_processes_is_that_of_one(in_two):
    of_each = in_two(after_steps_together)
    for case, *results in zip(STEPS, *of_each, strict=True):
        weights, totals = after_a_step(*case, TrainStep)
        for ours, our_totals in results:
            assert our_totals == pytest.approx(totals, rel=1e-10), case
            assert ours.keys() == weights.keys()
            for name, value in weights.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-10,
                                           msg=f"{case} {name}: {{}}".format)  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # the tensors stay on the CPU
@pytest.mark.parametrize("name", ["logistic-regression", "resnet"])
def test_a_converted_model_is_the_same_in_one_process(name, device):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    converted = convert_sync_batch_norm(copy.deepcopy(model), device)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert smallest_part(converted) == 1
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        answers = [m.train(training)(images) for m in (converted, model)]
        torch.testing.assert_close(*answers)
    for answer in answers:
        answer.square().sum().backward()
    for ours, theirs in zip(converted.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[key], value)


# --- whole runs -----------------------------------------------------------------------------------

SETTINGS = {
    "plain": {"batch_size": 16},
    # 69 images train: the last batch has one image, of which the second process has none.
    "everything": {"batch_size": 17, "augment": True, "rotate": True, "color_jitter": 0.1,
                   "class_weights": True, "label_smoothing": 0.1, "ema_decay": 0.9, "lr": 1e-3,
                   "lr_schedule": "one-cycle", "validation_fraction": 0.2, "patience": 1,
                   "epochs": 3},
    "synchronised": {"model": "logistic-regression", "sync_batch_norm": True},
    "by parts": {"model": "logistic-regression"},
}  # fmt: skip


@pytest.fixture
def configs(small_data):
    base = TrainConfig(data=str(small_data), image_size=32, epochs=2, batch_size=16, device="cpu")
    return {name: dataclasses.replace(base, **settings) for name, settings in SETTINGS.items()}


def train_together(configs, folder):
    seen = []
    with joined():
        for name, config in configs.items():
            train(config, folder / name, on_epoch=seen.append)
    return len(seen)


def of_run(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, load_model(folder / "model.safetensors")[0].state_dict()


def test_runs_follow_the_curve_of_one_process(in_two, configs, tmp_path):
    told, told_by_second = in_two(train_together, configs, tmp_path)
    assert told > 0 and told_by_second == 0
    for name, config in configs.items():
        train(config, tmp_path / "alone" / name)
        (ours, weights), (theirs, expected) = (
            of_run(tmp_path / name),
            of_run(tmp_path / "alone" / name),
        )
        curves = [[line["train_loss"] for line in lines] for lines in (ours, theirs)]
        if name == "by parts":  # statistics of other images: close, but another curve
            assert curves[0] != pytest.approx(curves[1], rel=1e-4)
            assert curves[0] == pytest.approx(curves[1], rel=0.2)
            continue
        assert [line["processes"] for line in ours] == [2] * len(theirs), name
        for mine, other in zip(ours, theirs, strict=True):
            for key in other.keys() - {"seconds", "images_per_second", "processes"}:
                assert mine[key] == pytest.approx(other[key], rel=1e-5), (name, key)
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5,
                                       msg=f"{name} {key}: {{}}".format)  # fmt: skip


def train_without_arenas(configs, folder):
    with no_arenas():
        return train_together(configs, folder)


def test_runs_are_the_same_to_the_bit_without_arenas(in_two, configs, tmp_path):
    configs = {name: configs[name] for name in ("everything", "by parts")}
    in_two(train_together, configs, tmp_path / "arenas")
    in_two(train_without_arenas, configs, tmp_path / "apart")
    for name in configs:
        (ours, weights), (theirs, expected) = (
            of_run(tmp_path / kind / name) for kind in ("arenas", "apart")
        )
        assert all(torch.equal(weights[key], value) for key, value in expected.items())
        for mine, other in zip(ours, theirs, strict=True):
            for key in other.keys() - {"seconds", "images_per_second"}:
                assert mine[key] == other[key], (name, key)


def resume_together(config, folder):
    with joined():
        train(config, folder, resume=True)


def test_a_run_goes_on_in_another_number_of_processes(in_two, configs, tmp_path):
    config = dataclasses.replace(configs["everything"], lr_schedule="constant", patience=0)
    begun = dataclasses.replace(config, epochs=1)
    train(config, tmp_path / "whole")
    in_two(train_together, {"split": begun}, tmp_path)
    train(config, tmp_path / "split", resume=True)
    train(begun, tmp_path / "joined")
    in_two(resume_together, config, tmp_path / "joined")
    whole, _ = of_run(tmp_path / "whole")
    for name, processes in {"split": [2, 1, 1], "joined": [1, 2, 2]}.items():
        lines, _ = of_run(tmp_path / name)
        assert [line["processes"] for line in lines] == processes
        for key in ("train_loss", "test_loss", "validation_balanced_accuracy"):
            expected = [line[key] for line in whole]
            assert [line[key] for line in lines] == pytest.approx(expected, rel=1e-4)


# --- the command ----------------------------------------------------------------------------------


def command(arguments, failing=None):
    """Exit code, stdout and stderr of the command; ``failing`` runs out of memory in its steps."""
    real = DistributedStep._learn
    out, err = io.StringIO(), io.StringIO()
    if os.environ["RANK"] == failing:

        def fail(*_):
            raise MemoryError

        DistributedStep._learn = fail
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        code = traceback.format_exc()
    finally:
        DistributedStep._learn = real
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("options", "failing", "message"),
    [
        (["--lr", "-1"], None, "--lr is -1.0; it needs to be above 0"),
        (["--data", "nowhere"], None, "nowhere"),
        (["--batch-size", "1"], None, "of which 2 processes have a part each; give at least 2"),
        (["--lr", "1e30"], None, "the loss is not finite after epoch 1; lower --lr"),
        ([], "1", "out of memory; lower --batch-size"),
    ],
)
def test_a_failure_is_told_of_once(in_two, small_data, tmp_path, options, failing, message):
    arguments = ["train", "--data", str(small_data), "--image-size", "32", "--epochs", "1",
                 "--device", "cpu", "--output", str(tmp_path / "run"), *options]  # fmt: skip
    ended = in_two(command, arguments, failing)
    assert [code for code, _, _ in ended] == [2, 2]
    assert all(out == "" for _, out, _ in ended)
    lines = [line for *_, err in ended for line in err.splitlines()]
    (complaint,) = (line for line in lines if not line.startswith(("cnn on cpu, 2 pr", "epoch 1:")))
    assert complaint.startswith("skinfast: ") and message in complaint


def test_other_commands_refuse_to_run_in_several_processes(in_two, tmp_path):
    (first, _, line), (second, _, silence) = in_two(command, ["evaluate", str(tmp_path)])
    assert first == second == 2 and silence == ""
    assert line == "skinfast: only `skinfast train` runs in several processes; leave torchrun out\n"


def lose_the_other(rank, port, pipe):
    def meet():
        with joined():
            if rank == 1:
                os._exit(9)
            dist.all_reduce(torch.zeros(1))

    try:
        call_as(rank, port, meet, ())
    except SkinfastError as error:
        pipe.send(str(error))


def test_a_process_that_was_killed_is_told_of():
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    port = free_port()
    processes = [
        context.Process(target=lose_the_other, args=(rank, port, sender)) for rank in range(COUNT)
    ]
    for process in processes:
        process.start()
    assert receiver.poll(60)
    assert receiver.recv().startswith("another process of the training has ended, most likely")
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 9]


def test_torchrun_leaves_one_run_folder_and_prints_once(small_data, tmp_path):
    arguments = ["train", "--data", str(small_data), "--image-size", "32", "--epochs", "1",
                 "--device", "cpu", "--output", str(tmp_path / "run"), "--json"]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
              "-m", "skinfast", *arguments]  # fmt: skip
    ended = subprocess.run(launch, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert math.isfinite(json.loads(ended.stdout)["loss"])
    assert ended.stderr.count("cnn on cpu, 2 processes: ") == ended.stderr.count("epoch 1: ") == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "result.json",
        "predictions.npz",
        "model.safetensors",
        "checkpoint",
        "report.html",
    }


# --- GPUs, as far as a machine without one can tell -----------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs that are not there; the numbers that were chosen."""
    chosen = []
    monkeypatch.setattr("skinfast.training.distributed.choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_every_process_of_a_machine_takes_its_own_gpu(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in range(4):  # on two machines
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        Processes(rank, 4).take_gpu("cuda")
    assert gpus == [0, 1, 0, 1]
    Processes(0, 4).take_gpu("cpu")
    Processes().take_gpu("cuda:1")
    assert gpus == [0, 1, 0, 1]


def test_gpus_that_are_not_enough_or_the_same_are_refused(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(SkinfastError, match=r"3 processes on a machine of 2 GPUs; .*node=2"):
        Processes(0, 3).take_gpu("cuda")
    with pytest.raises(SkinfastError, match="--device is cuda:1, but every process takes a GPU"):
        Processes(0, 2).take_gpu("cuda:1")
    assert gpus == []
