"""What is installed and what it runs on: for `skinfast info`, result.json and reports of faults."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import skinfast

try:
    from skinfast import _host
except ImportError:  # built where Python.h was not installed
    _host = None  # type: ignore[assignment]


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """Versions, build and hardware, flat, ready for JSON; with ``device``, what a run used."""
    from skinfast.testing import has_cuda_kernels

    facts: dict[str, Any] = {
        "skinfast": skinfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
    }
    if _host is not None:
        build = _host.build_info()
        facts |= {
            "cpu_kernels": _host.cpu_instruction_set(),
            "built_with": build["compiler"],
            "built_for_torch": build["torch"],
            "built_cpu_kernels": build["cpu_instruction_sets"],
            "built_cuda_kernels": build["cuda"],
            "tensor_core_kernels": build["cutlass"],
        }
    commit = own_commit()
    if commit is not None:
        facts["commit"] = commit
    if device is not None:
        facts["device"] = str(device)
    if torch.cuda.is_available():
        facts["gpus"] = ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        )
        facts["torch_cuda"] = torch.version.cuda
        facts["cuda_kernels_loaded"] = has_cuda_kernels()
    return facts


def own_commit() -> str | None:
    """The commit that skinfast itself is of; see ``commit_of``.

    It stays what it was when first asked for, which a training does as it begins: its code is
    loaded then, whatever becomes of the checkout in the meantime.
    """
    return commit_of(Path(skinfast.__file__).parents[1])


@lru_cache
def commit_of(checkout: Path) -> str | None:
    """The commit of a checkout, with "-dirty" where its files were changed since.

    Args:
        checkout: its uppermost folder.

    Returns:
        None where the folder is none of git's, or a folder below: an installed skinfast may lie in
        the environment of another project's checkout.
    """
    if not (checkout / ".git").exists():
        return None
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *describe], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def started_with_others() -> bool:
    """Whether torchrun, or what sets the same variables, started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
