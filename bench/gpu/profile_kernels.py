"""Nsight Compute's view of skinfast's ten costliest kernels.

python bench/gpu/profile_kernels.py build/check_gpu/kernel_times.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from figures import NCU_METRICS
from tools import NOT_POSSIBLE, find_tool

COUNT = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("times", type=Path, help="what kernel_times.py wrote")
    options = parser.parse_args()
    program = find_tool("ncu")
    if program is None:
        print("ncu (Nsight Compute) was not found; it is part of the CUDA toolkit")
        return NOT_POSSIBLE
    names = costliest(json.loads(options.times.read_text())["kernels"])
    command = [program, "--csv", "--print-units", "base", "--metrics", ",".join(NCU_METRICS)]
    # Whole words, so that a name fits whether or not ncu puts its namespace before it.
    command += ["--kernel-name", rf"regex:\b({'|'.join(names)})\b", "--clock-control", "none"]
    command += [sys.executable, str(Path(__file__).with_name("kernel_times.py")), "--once"]
    command += ["--kernels", *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if "ERR_NVGPUCTRPERM" in done.stdout:
        print("the driver lets only an administrator read the GPU's counters (ERR_NVGPUCTRPERM)")
        return NOT_POSSIBLE
    return done.returncode


def costliest(rows: list[dict[str, object]]) -> list[str]:
    """The names of the kernels whose measured launches take longest."""
    measured = [row for row in rows if row.get("microseconds") is not None]
    ordered = sorted(measured, key=lambda row: -float(str(row["microseconds"])))
    return list(dict.fromkeys(str(row["kernel"]) for row in ordered))[:COUNT]


if __name__ == "__main__":
    sys.exit(main())
