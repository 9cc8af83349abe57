"""NVIDIA's tools: where they are, and how a stage says that one can't be used."""

from __future__ import annotations

import shutil
from pathlib import Path

#: Exit code of a stage that cannot run here, with the reason as its last line (as in automake).
NOT_POSSIBLE = 77


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on PATH or where the toolkit is usually installed."""
    if found := shutil.which(name):
        return found
    places = [Path("/usr/local/cuda/bin"), *sorted(Path("/opt/nvidia").glob("nsight-compute/*"))]
    return next((str(p / name) for p in reversed(places) if (p / name).is_file()), None)
