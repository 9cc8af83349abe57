"""Contenders side by side: equal results first, then turns, medians and spread.

Every speed that this project states was measured here, by these rules:

* results are compared before anything is timed, and a difference ends the run; float32 is that in
  what is compared and in what is timed, for a CUDA graph holds what it was captured with;
* contenders take turns, A B A B ..., so that a noisy minute falls on all of them; a time is the
  median over the rounds, and the least and the greatest stand beside it;
* PyTorch is represented by the fastest of its modes, chosen by the same measurement;
* peak memory on a CPU is that of a process of its own for each contender, and PyTorch's that of its
  fastest mode without a compiler, which takes memory that no step needs;
* every row is printed, the slower ones too. A ratio is PyTorch's time over ours.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import pickle
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skinfast.testing import full_float32
from skinfast.training.heap import give_back_freed_memory

Call = Callable[[], Any]
#: Runs a call so many times; returns the seconds of one.
Stopwatch = Callable[[Call, int], float]


class ResultsDifferError(Exception):
    """Two contenders do not compute the same, so there is nothing to compare."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        name: unique among the contenders.
        ours: whether it is skinfast's.
        build: makes the call that is timed. It can be pickled: its memory is measured elsewhere.
        compiles: whether its process holds a compiler as well.
    """

    name: str
    ours: bool
    build: Callable[[], Call]
    compiles: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, a sample for each round."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Row:
    """One of ours against the fastest of PyTorch's.

    Attributes:
        ratio: PyTorch's median over ours; above 1 ours is faster.
        ratio_range: the least and the greatest ratio of a round.
        ours_memory, pytorch_memory: peak bytes beyond the imports, None where not measured.
        modes: median seconds of every PyTorch mode.
    """

    name: str
    mode: str
    ours: Timing
    pytorch: Timing
    modes: dict[str, float]
    ours_memory: int | None
    pytorch_memory: int | None

    @property
    def ratio(self) -> float:
        return self.pytorch.median / self.ours.median

    @property
    def ratio_range(self) -> tuple[float, float]:
        pairs = zip(self.ours.samples, self.pytorch.samples, strict=True)
        ratios = [pytorch / ours for ours, pytorch in pairs]
        return min(ratios), max(ratios)


# --- time -----------------------------------------------------------------------------------------


def stopwatch(device: torch.device) -> Stopwatch:
    """Wall-clock time on a CPU, time between two events on a GPU."""

    def on_cpu(call: Call, repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - started) / repeats

    def on_cuda(call: Call, repeats: int) -> float:
        with torch.cuda.device(device):  # an event is recorded on the current device's stream
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / repeats / getattr(call, "calls", 1)

    return on_cuda if device.type == "cuda" else on_cpu


class Graphed:
    """Called, it replays a CUDA graph of ``calls`` calls: a small op's time without the host's.

    Raises:
        RuntimeError: the call cannot be captured.
    """

    calls = 20

    def __init__(self, call: Call, device: torch.device) -> None:
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                for _ in range(self.calls):
                    self._result = call()

    def __call__(self) -> Any:
        self._graph.replay()
        return self._result


def take_turns(
    calls: Mapping[str, Call], watch: Stopwatch, rounds: int, sample_seconds: float = 0.02
) -> dict[str, Timing]:
    """Time the calls in turns, after a warm-up; a sample takes about ``sample_seconds``."""
    repeats = {}
    for name, call in calls.items():
        watch(call, 2)
        repeats[name] = max(1, math.ceil(sample_seconds / watch(call, 1)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(watch(call, repeats[name]))
    return {name: Timing(values) for name, values in samples.items()}


# --- memory ---------------------------------------------------------------------------------------


def peak_memory(build: Callable[[], Call], device: torch.device) -> int | None:
    """Peak bytes that a contender needs, alone in a process; None where that can't be told.

    On a CPU it is anonymous memory beyond what the process held before ``build``: not the pages of
    libraries, which come when they are first read, nor the images that ``build`` holds. On a GPU it
    is what torch's allocator gave out beyond what it had given before, in this process.
    """
    if device.type == "cuda":
        return _peak_memory_on_cuda(build, device)
    # The server imports torch once, and every child is forked from it before any thread runs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            # By value: of shared pages the system may unmap some, which would count as a peak.
            return pool.submit(_peak_memory_of_this_process, pickle.dumps(build), threads).result()
        except BrokenProcessPool:
            return None


def _peak_memory_on_cuda(build: Callable[[], Call], device: torch.device) -> int:
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call = build()
    for _ in range(3):
        call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_memory_of_this_process(pickled_build: bytes, threads: int) -> int | None:
    import preload  # noqa: F401  (some Pythons' fork servers do not find it)

    torch.set_num_threads(threads)
    build = pickle.loads(pickled_build)
    del pickled_build
    give_back_freed_memory()
    before = _anonymous("VmRSS")
    try:  # the peak is from here on, not that of the imports
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    call = build()
    for _ in range(3):  # the second step of an optimizer holds what the first one made
        call()
    after = _anonymous("VmHWM")
    return None if before is None or after is None else after - before


def _anonymous(field: str) -> int | None:
    """VmRSS (now) or VmHWM (the most so far) less what files and shared memory have now, in bytes.

    Those are mapped for good, so at the peak they had as much but for what was read since. None
    where the system does not tell.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    kilobytes = {name: int(value) for name, value in re.findall(r"(\w+):\s+(\d+) kB", status)}
    if not {field, "RssFile", "RssShmem"} <= kilobytes.keys():
        return None
    return (kilobytes[field] - kilobytes["RssFile"] - kilobytes["RssShmem"]) * 1024


# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """How cases are measured in this run."""

    device: torch.device
    rounds: int
    stopwatch: Stopwatch
    memory: Callable[[Callable[[], Call], torch.device], int | None] = peak_memory

    @full_float32()
    def compare(
        self,
        name: str,
        contenders: Sequence[Contender],
        check: Callable[[dict[str, Any]], None],
        sample_seconds: float = 0.02,
    ) -> list[Row]:
        """Hold every contender of ours against the fastest of PyTorch's.

        Args:
            name: of the case, for a message.
            check: takes the contenders' calls; raises AssertionError where two differ.

        Raises:
            ResultsDifferError: ``check`` failed; nothing was timed.
        """
        calls = {contender.name: contender.build() for contender in contenders}
        try:
            check(calls)
        except AssertionError as error:
            raise ResultsDifferError(
                f"{name}: results differ, so nothing was timed: {error}"
            ) from error
        timings = take_turns(calls, self.stopwatch, self.rounds, sample_seconds)
        del calls
        modes = {c.name: timings[c.name].median for c in contenders if not c.ours}
        best = min((c for c in contenders if not c.ours), key=lambda c: modes[c.name])
        on_cpu = self.device.type == "cpu"  # a GPU's memory holds no compiler
        lean = [c for c in contenders if not c.ours and not (on_cpu and c.compiles)]
        pytorch_memory = None
        if lean:
            leanest = min(lean, key=lambda c: modes[c.name])
            pytorch_memory = self.memory(leanest.build, self.device)
        return [
            Row(
                name=c.name,
                mode=best.name,
                ours=timings[c.name],
                pytorch=timings[best.name],
                modes=modes,
                ours_memory=self.memory(c.build, self.device),
                pytorch_memory=pytorch_memory,
            )
            for c in contenders
            if c.ours
        ]
