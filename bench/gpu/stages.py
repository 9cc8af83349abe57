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


@dataclass(frozen=True)
class Settings:
    """Of a run.

    Attributes:
        folder: absolute; for everything that the stages write.
        capability: the GPU's, as (major, minor); None on a CPU.
        rehearse: on the CPU, with tiny settings.
    """

    folder: Path
    capability: Sequence[int] | None
    rehearse: bool

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"


def stages(settings: Settings) -> list[Stage]:
    """All of them, in their order; a rehearsal uses the build that is there."""
    build = [] if settings.rehearse else [_build(settings)]
    return [
        *build,
        _tests(settings),
        _selfcheck(settings),
        _sanitizer(settings, "memcheck", limit=90),
        _sanitizer(settings, "racecheck", limit=60),
        _bench(settings, "models", "bench_models.py", 100, _models(settings)),
        _own(settings, "epoch", BENCH / "bench_epoch.py", 100),
        _own(settings, "kernel_times", BENCH / "gpu" / "kernel_times.py", 60),
        _bench(settings, "ops", "bench_ops.py", 60, _ops(settings)),
        _own(settings, "autotune", BENCH / "gpu" / "autotune.py", 60),
        _ncu(settings),
        _bench(settings, "compiled_models", "bench_models.py", 240, _compiled(settings)),
    ]


def _build(settings: Settings) -> Stage:
    major, minor = settings.capability or (0, 0)
    architecture = f"{major}.{minor}{'a' if major >= 9 else ''}"
    return Stage(
        "build",
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        limit=240,
        environment={"SKINFAST_CUDA": "ON", "TORCH_CUDA_ARCH_LIST": architecture},
    )


def _tests(settings: Settings) -> Stage:
    junit = settings.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    if settings.rehearse:
        command += ["tests/ops/test_add_relu.py"]
    else:
        command += ["tests", "--ignore=tests/emulation", "--ignore=tests/bench"]
        command += ["-k", "cuda or gpu or device"]
        command += ["--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(TEST_WORKERS)]
        if importlib.util.find_spec("pytest_timeout"):
            command += ["--timeout=60"]
    return Stage("tests", command, 150, partial(figures.of_pytest, junit), needs=["build"])


def _selfcheck(settings: Settings) -> Stage:
    file = settings.folder / "selfcheck.json"
    command = [sys.executable, "-c", SELFCHECK, "selfcheck", "--output", str(file)]
    return Stage("selfcheck", command, 90, partial(figures.of_selfcheck, file), needs=["build"])


def _sanitizer(settings: Settings, tool: str, limit: float) -> Stage:
    folder = BENCH / "gpu"
    command = [sys.executable, str(folder / "sanitize.py"), tool]
    if settings.rehearse:
        command = [sys.executable, str(folder / "small_shapes.py"), "--device", "cpu", "add_relu"]
    read = partial(figures.of_sanitizer, settings.folder / f"{tool}.log")
    return Stage(tool, command, limit, read, needs=["build"])


def _bench(
    settings: Settings, name: str, script: str, limit: float, arguments: Sequence[str]
) -> Stage:
    file = settings.folder / f"{name}.json"
    command = [sys.executable, str(BENCH / script), "--device", settings.device, "--no-memory"]
    command += ["--output", str(file), *arguments]
    read = partial(figures.of_bench, file)
    return Stage(name, command, limit, read, cut_short=True, needs=["build"])


def _models(settings: Settings) -> list[str]:
    """Steps against PyTorch's eager modes, which compile nothing; the quick models first."""
    if settings.rehearse:
        return ["--model", "logistic-regression", "--quick"]
    models = ("cnn", "logistic-regression", "resnet50")
    chosen = [argument for model in models for argument in ("--model", model)]
    return ["--eager", "--steps", "--rounds", "5", "--batch-size", "256", *chosen]


def _compiled(settings: Settings) -> list[str]:
    """Against torch.compile with CUDA graphs; for its longest search there is no time."""
    if settings.rehearse:
        return ["--model", "logistic-regression", "--quick"]
    return [
        *("--steps", "--rounds", "5", "--batch-size", "256", "--precision", "bfloat16"),
        *("--compile-mode", "reduce-overhead", "--model", "resnet50", "--model", "cnn"),
    ]


def _ops(settings: Settings) -> list[str]:
    """The first shape of every op."""
    return ["add_relu", "--quick"] if settings.rehearse else ["--quick", "--rounds", "5"]


def _own(settings: Settings, name: str, script: Path, limit: float) -> Stage:
    """A script that writes its figures with ``--output FILE``."""
    file = settings.folder / f"{name}.json"
    reason = "" if script.is_file() else f"there is no {script.relative_to(ROOT)}"
    if settings.rehearse:
        reason = reason or "it measures a GPU alone"
    command = [sys.executable, str(script), "--output", str(file)]
    read = partial(figures.of_json, file)
    return Stage(name, command, limit, read, cut_short=True, needs=["build"], reason=reason)


def _ncu(settings: Settings) -> Stage:
    script = str(BENCH / "gpu" / "profile_kernels.py")
    return Stage(
        "ncu",
        [sys.executable, script, str(settings.folder / "kernel_times.json")],
        limit=60,
        figures=partial(figures.of_ncu, settings.folder / "ncu.log"),
        cut_short=True,
        needs=["build", "kernel_times"],
        reason="it measures a GPU alone" if settings.rehearse else "",
    )
