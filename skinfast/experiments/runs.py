"""The engine of every experiment: named runs, each in its folder, done once.

A run that is finished is not done again, and one that was stopped goes on after its last epoch. So
an experiment that was interrupted is finished by the same command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from skinfast.errors import DivergedError, SkinfastError
from skinfast.evaluation import write_result
from skinfast.evaluation.bootstrap import Answers
from skinfast.report import write_report
from skinfast.training import TrainConfig, prepare, train
from skinfast.training.config import option
from skinfast.training.problem import choose_device
from skinfast.training.run_folder import RunFolder

# May differ between the command that began a run and the one that finishes it.
_FREE_SETTINGS = ("device",)


@dataclass(frozen=True)
class NamedRun:
    """A training of an experiment.

    Attributes:
        name: of its folder; slashes make folders within folders.
        config: its settings.
    """

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Outcome:
    """What a finished run left.

    Attributes:
        result: the content of result.json.
        answers: the probabilities of its test images.
    """

    config: TrainConfig
    result: dict[str, Any]
    answers: Answers


@dataclass(frozen=True)
class Outcomes:
    """The outcome of every run by its name; why the others have none."""

    finished: dict[str, Outcome]
    diverged: dict[str, str] = field(default_factory=dict)


def run_all(
    runs: Sequence[NamedRun],
    directory: str | os.PathLike[str],
    *,
    jobs: int = 1,
    on_line: Callable[[str], None] | None = None,
) -> Outcomes:
    """Train and evaluate every run that is not finished yet, each in ``directory/runs/<name>``.

    A run whose loss stops being finite is reported, and the others go on.

    Args:
        runs: with names that differ.
        directory: made where it is not there.
        jobs: processes that train at the same time; the CPU's threads are divided among them, and
            they are dealt to the GPUs in turn.
        on_line: called with a line for every run that ends.

    Raises:
        SkinfastError: fewer than one job, a folder that holds another run, or data that cannot be
            used. What was finished stays.
        OSError: a folder cannot be written.
    """
    if jobs < 1:
        raise SkinfastError(f"--jobs is {jobs}; it needs to be at least 1")
    if Path(directory).is_file():
        raise SkinfastError(f"{directory} is a file; choose another --output")
    folders = {run.name: Path(directory) / "runs" / run.name for run in runs}
    # All of them first: an experiment of hours should not fail at its last run for this.
    waiting = [run for run in runs if not _is_finished(folders[run.name], run.config)]
    for name in folders.keys() - {run.name for run in waiting}:
        _conclude(folders[name])
    _note(on_line, f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before")
    diverged: dict[str, str] = {}
    for done, (run, problem) in enumerate(_carry_out(waiting, folders, jobs), start=1):
        if problem is not None:
            diverged[run.name] = problem
        _note(on_line, f"{done} of {len(waiting)}: {run.name}: {problem or _summary(folders, run)}")
    return Outcomes(
        {run.name: read_outcome(folders[run.name]) for run in runs if run.name not in diverged},
        diverged,
    )


def read_outcome(folder: str | os.PathLike[str]) -> Outcome:
    """What a finished run left in its folder.

    Raises:
        SkinfastError: the run has not finished, or a file of it is broken.
    """
    folder = Path(folder)
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        with np.load(folder / "predictions.npz", allow_pickle=False) as archive:
            names = ("image_ids", "lesion_ids", "labels", "probabilities")
            answers = Answers(*(archive[name] for name in names))
    except Exception as error:  # what np.load raises depends on the byte where a file was cut
        raise SkinfastError(
            f"{folder} is broken ({type(error).__name__}: {error}); remove it and run again"
        ) from error
    return Outcome(TrainConfig.load(RunFolder(folder).config_file), result, answers)


def commits_of(outcomes: Iterable[Outcome]) -> list[str]:
    """The commits that runs were trained with, each once; "None" for runs outside of a checkout."""
    return sorted({str(o.result["environment"].get("commit")) for o in outcomes})


def _is_finished(folder: Path, config: TrainConfig) -> bool:
    """Whether the folder holds this run's result; refuses one that holds another run."""
    run = RunFolder(folder)
    if not run.config_file.is_file():
        run.check_new()
        return False
    found = TrainConfig.load(run.config_file)
    for setting in dataclasses.fields(TrainConfig):
        is_there, wanted = getattr(found, setting.name), getattr(config, setting.name)
        if setting.name not in _FREE_SETTINGS and is_there != wanted:
            raise SkinfastError(
                f"{folder} holds a run with {option(setting.name)} {is_there}, not {wanted}; "
                "choose another --output"
            )
    return (folder / "result.json").is_file()


def _carry_out(
    runs: Sequence[NamedRun], folders: Mapping[str, Path], jobs: int
) -> Iterator[tuple[NamedRun, str | None]]:
    """Every run when it has ended, with the reason where it diverged."""
    if jobs == 1 or len(runs) < 2:
        for run in runs:
            yield run, _finish(run.config, folders[run.name])
        return
    # A forked child would inherit torch's thread pool without its threads, and hang.
    context = multiprocessing.get_context("spawn")
    jobs = min(jobs, len(runs))
    threads = max(1, torch.get_num_threads() // jobs)
    gpus = context.SimpleQueue()
    for gpu in _deal_gpus([run.config.device for run in runs], jobs):
        gpus.put(gpu)
    leash, held = context.Pipe(duplex=False)
    waiting = iter(runs)
    running: dict[Future[str | None], NamedRun] = {}
    pool = ProcessPoolExecutor(jobs, context, _begin_worker, (threads, gpus, leash))
    with leash, held, pool:
        try:
            while True:
                # No more than there are workers, who begin what waits in the pool whatever happens.
                for run in itertools.islice(waiting, jobs - len(running)):
                    running[pool.submit(_finish, run.config, folders[run.name])] = run
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                yield from [(running.pop(future), future.result()) for future in done]
        except BaseException as error:  # Ctrl-C too, or the caller has had enough
            held.close()  # or the pool would wait until the workers have trained to the end
            if isinstance(error, BrokenProcessPool):
                raise SkinfastError(
                    "a training process was killed, most likely for want of memory; give fewer "
                    "--jobs, what has finished is kept"
                ) from error
            raise


def _deal_gpus(devices: Sequence[str], jobs: int) -> list[int | None]:
    """The GPU that "cuda" is in each job, all GPUs in turn; None if no run leaves it open which."""
    is_open = any(choose_device(name) == torch.device("cuda") for name in set(devices))
    gpus = torch.cuda.device_count() if is_open else 0
    return [job % gpus if gpus else None for job in range(jobs)]


def _begin_worker(threads: int, gpus: SimpleQueue[int | None], leash: Connection) -> None:
    # Ctrl-C reaches every process of a terminal; the first of them tells, and lets go of the leash.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_without, args=(leash,), daemon=True).start()
    # tqdm's own is a semaphore of the system, which Python complains about where it is left behind.
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(threads)
    gpu = gpus.get()
    if gpu is not None:
        torch.cuda.set_device(gpu)


def _end_without(leash: Connection) -> None:
    """End this process when the other end of the leash is closed, or its process has died."""
    with contextlib.suppress(EOFError, OSError):
        leash.recv()
    os._exit(1)


def _finish(config: TrainConfig, folder: Path) -> str | None:
    """Train to the end, evaluate and report; the reason where the run diverged."""
    run = RunFolder(folder)
    try:
        problem = prepare(config)
        train(config, folder, resume=run.config_file.is_file(), problem=problem)
    except DivergedError as error:
        return str(error)
    write_result(folder, problem)
    _conclude(folder)
    return None


def _conclude(folder: Path) -> None:
    """What is left to do for a run that has its result, in case it was killed right after that."""
    if not (folder / "report.html").is_file():
        write_report(folder)
    # A finished run needs no checkpoint, which for ResNet-50 is 280 MB.
    shutil.rmtree(RunFolder(folder).checkpoint_file.parent, ignore_errors=True)


def _summary(folders: Mapping[str, Path], run: NamedRun) -> str:
    result = read_outcome(folders[run.name]).result
    return (
        f"accuracy {result['accuracy']:.4f}, balanced accuracy {result['balanced_accuracy']:.4f}, "
        f"{result['train_seconds']:.0f} s"
    )


def _note(on_line: Callable[[str], None] | None, line: str) -> None:
    if on_line:
        on_line(line)
