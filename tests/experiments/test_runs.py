"""The engine: every run once, stopped ones go on, other ones are refused, diverged ones named."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from skinfast.errors import DivergedError, SkinfastError
from skinfast.experiments import NamedRun, run_all, runs
from skinfast.experiments.runs import read_outcome


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def named(config, count=2):
    return [
        NamedRun(f"group/seed-{seed}", dataclasses.replace(config, seed=seed))
        for seed in range(count)
    ]


def test_runs_are_done_once(config, tmp_path):
    lines = []
    first = run_all(named(config), tmp_path, on_line=lines.append)
    assert list(first.finished) == ["group/seed-0", "group/seed-1"] and not first.diverged
    assert lines[0] == "2 runs, 0 of them finished before"
    assert lines[1].startswith("1 of 2: group/seed-0: accuracy ")
    folder = tmp_path / "runs" / "group" / "seed-0"
    assert (folder / "report.html").is_file() and not (folder / "checkpoint").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    lines.clear()
    again = run_all(named(config, 3), tmp_path, on_line=lines.append)
    assert lines[0] == "3 runs, 2 of them finished before" and len(lines) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.is_file())
    outcome = again.finished["group/seed-1"]
    assert outcome.config == named(config)[1].config
    np.testing.assert_array_equal(
        outcome.answers.probabilities, first.finished["group/seed-1"].answers.probabilities
    )
    assert len(set(outcome.answers.lesion_ids)) < len(outcome.answers.image_ids)


def test_stopped_run_goes_on_to_the_same_weights(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, epochs=3)
    run_all(named(config, 1), tmp_path / "whole")

    class StopError(Exception):
        pass

    real, calls = runs.train, []

    def stopping(config, output, **options):
        def stop(epoch):
            if epoch["epoch"] == 2:
                raise StopError

        calls.append(options["resume"])
        return real(config, output, on_epoch=None if options["resume"] else stop, **options)

    monkeypatch.setattr(runs, "train", stopping)
    with pytest.raises(StopError):
        run_all(named(config, 1), tmp_path / "halves")
    run_all(named(config, 1), tmp_path / "halves")
    assert calls == [False, True]
    assert weights(tmp_path / "whole/runs/group/seed-0") == weights(
        tmp_path / "halves/runs/group/seed-0"
    )


@pytest.mark.parametrize("killed_at", ["write_report", "shutil.rmtree"])
def test_run_killed_after_its_result_is_concluded(config, tmp_path, monkeypatch, killed_at):
    class KillError(Exception):
        pass

    def die(*_, **__):
        raise KillError

    with monkeypatch.context() as killed, pytest.raises(KillError):
        killed.setattr(f"skinfast.experiments.runs.{killed_at}", die)
        run_all(named(config, 1), tmp_path)
    folder = tmp_path / "runs/group/seed-0"
    assert (folder / "result.json").is_file() and (folder / "checkpoint/state.pt").is_file()
    lines = []
    run_all(named(config, 1), tmp_path, on_line=lines.append)
    assert lines == ["1 runs, 1 of them finished before"]
    assert (folder / "report.html").is_file() and not (folder / "checkpoint").exists()


def test_runs_in_parallel_equal_runs_in_turn(config, tmp_path):
    one = run_all(named(config), tmp_path / "turn")
    two = run_all(named(config), tmp_path / "parallel", jobs=2)
    for name, outcome in one.finished.items():
        np.testing.assert_allclose(
            outcome.answers.probabilities, two.finished[name].answers.probabilities, atol=1e-6
        )


@pytest.mark.parametrize(
    ("devices", "gpus", "dealt"),
    [
        (["cuda", "cuda"], 1, [0, 0, 0]),
        (["cuda"], 2, [0, 1, 0]),
        (["cuda:1", "cuda"], 4, [0, 1, 2]),
        (["cuda:1"], 2, [None, None, None]),  # that one, for all
        (["cpu"], 2, [None, None, None]),
    ],
)
def test_jobs_are_dealt_to_the_gpus_in_turn(monkeypatch, devices, gpus, dealt):
    monkeypatch.setattr(runs, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert runs._deal_gpus(devices, 3) == dealt


def test_a_job_begins_on_the_gpu_that_it_was_dealt(monkeypatch):
    chosen, threads = [], []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(runs.signal, "signal", lambda *_: None)
    monkeypatch.setattr(runs, "_end_without", lambda leash: None)
    gpus = multiprocessing.get_context("spawn").SimpleQueue()
    for gpu in (1, None, 0):
        gpus.put(gpu)
    for _ in range(3):
        runs._begin_worker(2, gpus, None)
    assert chosen == [1, 0] and threads == [2, 2, 2]


def test_folder_of_another_run_is_refused_before_anything_is_trained(config, tmp_path):
    run_all([named(config, 2)[1]], tmp_path)
    other = dataclasses.replace(config, lr=0.5)
    with pytest.raises(SkinfastError, match=r"holds a run with --lr 0\.001, not 0\.5; choose"):
        run_all(named(other, 2), tmp_path)
    assert not (tmp_path / "runs/group/seed-0").exists()
    # A device is no part of what a run is.
    run_all(
        [NamedRun("group/seed-1", dataclasses.replace(config, seed=1, device="auto"))], tmp_path
    )


def test_strange_folders_are_refused(config, tmp_path):
    (tmp_path / "runs/group/seed-0").mkdir(parents=True)
    (tmp_path / "runs/group/seed-0/notes.txt").write_text("mine")
    with pytest.raises(SkinfastError, match="seed-0 exists; choose another --output"):
        run_all(named(config), tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SkinfastError, match="file is a file; choose another --output"):
        run_all(named(config), tmp_path / "file")
    with pytest.raises(SkinfastError, match="--jobs is 0; it needs to be at least 1"):
        run_all(named(config), tmp_path / "new", jobs=0)


def test_diverged_run_is_named_and_the_others_go_on(config, tmp_path, monkeypatch):
    real = runs.train

    def diverging(config, output, **options):
        if config.seed == 0:
            raise DivergedError("the loss is not finite after epoch 1; lower --lr")
        return real(config, output, **options)

    monkeypatch.setattr(runs, "train", diverging)
    outcomes = run_all(named(config), tmp_path)
    assert list(outcomes.finished) == ["group/seed-1"]
    assert outcomes.diverged == {"group/seed-0": "the loss is not finite after epoch 1; lower --lr"}


def test_killed_process_is_explained(config, tmp_path, monkeypatch):
    class Dying(runs.ProcessPoolExecutor):
        def submit(self, *_):
            return super().submit(os._exit, 9)

    monkeypatch.setattr(runs, "ProcessPoolExecutor", Dying)
    with pytest.raises(SkinfastError, match="was killed, most likely for want of memory; give few"):
        run_all(named(config), tmp_path, jobs=2)


def long(config, count):
    """Runs that are still at work when the test is over."""
    return named(dataclasses.replace(config, epochs=3000), count)


def test_a_run_that_cannot_be_ends_the_others(config, tmp_path):
    impossible = NamedRun("impossible", dataclasses.replace(config, data=str(tmp_path / "nowhere")))
    begun, *queued = long(config, 3)
    with pytest.raises(SkinfastError, match="nowhere"):
        run_all([begun, impossible, *queued], tmp_path, jobs=2)
    assert not multiprocessing.active_children()
    assert not (tmp_path / "runs" / begun.name / "result.json").exists()
    assert not any((tmp_path / "runs" / run.name).exists() for run in queued)


def test_an_error_of_the_caller_ends_the_runs(config, tmp_path):
    def full(line):
        if line.startswith("1 of 3"):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_all([NamedRun("short", config), *long(config, 2)], tmp_path, jobs=2, on_line=full)
    assert not multiprocessing.active_children()
    assert [path.parent.name for path in tmp_path.rglob("result.json")] == ["short"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_command(config, tmp_path, number):
    command = ["cross-validate", "--model", config.model, "--data", config.data, "--jobs", "2",
               "--image-size", "16", "--epochs", "3000", "--output", "out"]  # fmt: skip
    program = "import sys; from skinfast.cli import main; sys.exit(main(sys.argv[1:]))"
    folds = [tmp_path / f"out/runs/{config.model}/repeat-0/fold-{fold}" for fold in range(5)]
    with subprocess.Popen(
        [sys.executable, "-c", program, *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while process.poll() is None and not all((f / "metrics.jsonl").exists() for f in folds[:2]):
            time.sleep(0.1)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as Ctrl-C in a terminal: every process has it
        else:
            process.kill()
        # The workers have the same stderr: it ends when the last of them has.
        _, errors = process.communicate()
    assert not any((fold / "result.json").exists() for fold in folds)
    first, *last = errors.splitlines()
    assert first == "5 runs, 0 of them finished before"
    if number == signal.SIGINT:
        assert process.returncode == 130 and len(last) == 1
        assert last[0].startswith("skinfast: interrupted; ")
    assert [fold.exists() for fold in folds] == [True, True, False, False, False]


@pytest.mark.parametrize("name", ["result.json", "predictions.npz"])
def test_broken_outcome_is_refused_by_name(config, tmp_path, name):
    run_all(named(config, 1), tmp_path)
    folder = tmp_path / "runs/group/seed-0"
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(SkinfastError, match=r"seed-0 is broken .*; remove it and run again"):
        read_outcome(folder)
