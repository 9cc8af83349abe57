"""The stages of check_gpu, the most valuable first: a run that is cut off has done those."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import figures
from runner import Stage

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
SELFCHECK = "import sys; from skinfast.cli import main; sys.exit(main(sys.argv[1:]))"
# A worker holds a context of half a gigabyte on the GPU.
TEST_WORKERS = 8
#: The limit of what has none but the run's.
REST = float("inf")


@dataclass(frozen=True)
class Settings:
    """Of a run.

    Attributes:
        folder: absolute; for everything that the stages write.
        capability: the GPU's, as (major, minor); None on a CPU.
        rehearse: on the CPU, with tiny settings.
        data: HAM10000, absolute; None for synthetic images.
    """

    folder: Path
    capability: Sequence[int] | None
    rehearse: bool
    data: Path | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"


def stages(settings: Settings) -> list[Stage]:
    """All of them, in their order; a rehearsal uses the build that is there.

    The limits of all but the epochs fit the run's own, SECONDS of check.py, together: what a stage
    takes can't leave another without. The epochs, which nothing waits for, have what is left.
    """
    build = [] if settings.rehearse else [_build(settings)]
    return [
        *build,
        _tests(settings),
        _sanitizer(settings, "memcheck", limit=60),
        _sanitizer(settings, "racecheck", limit=40),
        _own(settings, "kernel_times", "gpu/kernel_times.py", 60),
        _ncu(settings),
        _selfcheck(settings),
        _own(settings, "autotune", "gpu/autotune.py", 30),
        _ops(settings),
        _own(settings, "epoch", "bench_epoch.py", REST, _epoch(settings)),
        # By itself: torch.compile may fail, and takes minutes, of which what comes first is done.
        _own(settings, "epoch_compiled", "bench_epoch.py", REST, _compiled(settings)),
    ]


def _build(settings: Settings) -> Stage:
    major, minor = settings.capability or (0, 0)
    architecture = f"{major}.{minor}{'a' if major >= 9 else ''}"
    return Stage(
        "build",
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        limit=150,
        environment={"SKINFAST_CUDA": "ON", "TORCH_CUDA_ARCH_LIST": architecture},
    )


def _tests(settings: Settings) -> Stage:
    junit = settings.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    if settings.rehearse:
        command += ["tests/ops/test_add_relu.py"]
    else:
        command += ["tests", "--ignore=tests/emulation", "--ignore=tests/bench"]
        command += ["-k", "cuda or gpu or device or tensor_core"]
        command += ["--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist"):
            # By group: one worker makes the tests that fill the GPU's memory.
            command += ["-n", str(TEST_WORKERS), "--dist", "loadgroup"]
        if importlib.util.find_spec("pytest_timeout"):
            command += ["--timeout=60"]
    return Stage("tests", command, 100, partial(figures.of_pytest, junit), needs=["build"])


def _selfcheck(settings: Settings) -> Stage:
    file = settings.folder / "selfcheck.json"
    command = [sys.executable, "-c", SELFCHECK, "selfcheck", "--output", str(file)]
    return Stage("selfcheck", command, 30, partial(figures.of_selfcheck, file), needs=["build"])


def _sanitizer(settings: Settings, tool: str, limit: float) -> Stage:
    folder = BENCH / "gpu"
    command = [sys.executable, str(folder / "sanitize.py"), tool]
    if settings.rehearse:
        command = [sys.executable, str(folder / "small_shapes.py"), "--device", "cpu", "add_relu"]
    read = partial(figures.of_sanitizer, settings.folder / f"{tool}.log")
    return Stage(tool, command, limit, read, needs=["build"])


def _ops(settings: Settings) -> Stage:
    """The first shape of every op."""
    file = settings.folder / "ops.json"
    command = [sys.executable, str(BENCH / "bench_ops.py"), "--device", settings.device]
    command += ["--no-memory", "--output", str(file), "--quick"]
    command += ["add_relu"] if settings.rehearse else ["--rounds", "5"]
    read = partial(figures.of_bench, file)
    limit = REST if settings.rehearse else 20  # a CPU takes long to find its ceilings
    return Stage("ops", command, limit, read, cut_short=True, needs=["build"])


def _epoch(settings: Settings) -> list[str]:
    data = ["--data", str(settings.data)] if settings.data else []
    return ["--device", settings.device, *data]


def _compiled(settings: Settings) -> list[str]:
    """Against torch.compile's longest search, the model that compiles sooner first."""
    chosen = ["--image-size", "64", "--model", "cnn", "--model", "resnet50"]
    return [*_epoch(settings), "--compile", *chosen]


def _own(
    settings: Settings, name: str, script: str, limit: float, arguments: Sequence[str] = ()
) -> Stage:
    """A script of bench that writes its figures with ``--output FILE``."""
    file = settings.folder / f"{name}.json"
    reason = "it measures a GPU alone" if settings.rehearse else ""
    command = [sys.executable, str(BENCH / script), "--output", str(file), *arguments]
    read = partial(figures.of_json, file)
    return Stage(name, command, limit, read, cut_short=True, needs=["build"], reason=reason)


def _ncu(settings: Settings) -> Stage:
    script = str(BENCH / "gpu" / "profile_kernels.py")
    return Stage(
        "ncu",
        [sys.executable, script, str(settings.folder / "kernel_times.json")],
        limit=30,
        figures=partial(figures.of_ncu, settings.folder / "ncu.log"),
        cut_short=True,
        needs=["build", "kernel_times"],
        reason="it measures a GPU alone" if settings.rehearse else "",
    )
