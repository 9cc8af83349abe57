"""``skinfast bench``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import skinfast
from skinfast.cli.shared import Subparsers, add_command
from skinfast.errors import SkinfastError


def add(commands: Subparsers) -> None:
    command = add_command(
        commands,
        "bench",
        _run,
        "time models or ops side by side with PyTorch (needs a checkout)",
        "skinfast bench cnn --quick",
    )
    command.add_argument(
        "what", nargs="?", default="models", help="models (default), ops, one model or one op"
    )
    command.add_argument("--quick", action="store_true", help="a short look")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--output", metavar="FILE", help="write JSON here and a plot beside it")


def _run(options: argparse.Namespace) -> int:
    from skinfast.models import MODELS

    root = Path(skinfast.__file__).resolve().parents[1]
    if not (root / "bench" / "harness.py").is_file():
        raise SkinfastError(
            "the benchmarks are not part of an installed package; run this in a checkout of the "
            "repository, after `pip install --editable .` there"
        )
    ops = sorted(p.stem.removeprefix("bench_") for p in (root / "bench/ops").glob("bench_*.py"))
    script, selection = {
        "models": ("bench_models.py", []),
        "ops": ("bench_ops.py", []),
        **{name: ("bench_models.py", ["--model", name]) for name in MODELS},
        **{name: ("bench_ops.py", [name]) for name in ops},
    }.get(options.what, (None, []))
    if script is None:
        names = ", ".join(["models", "ops", *MODELS, *ops])
        raise SkinfastError(f"there is no benchmark {options.what!r}; choose one of {names}")
    command = [sys.executable, str(root / "bench" / script), *selection, "--device", options.device]
    command += [f"--{flag}" for flag in ("quick", "json") if getattr(options, flag)]
    command += ["--output", options.output] if options.output else []
    # The package that is running is the one that is measured.
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
