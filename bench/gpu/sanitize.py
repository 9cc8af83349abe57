"""small_shapes.py under a tool of compute-sanitizer, which watches skinfast's kernels alone.

python bench/gpu/sanitize.py memcheck
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tools import NOT_POSSIBLE, find_tool

# An exit code that small_shapes.py does not have.
FOUND_ERRORS = 99


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=("memcheck", "racecheck", "synccheck", "initcheck"))
    parser.add_argument("ops", nargs="*", help="default: all")
    options = parser.parse_args()
    program = find_tool("compute-sanitizer")
    if program is None:
        print("compute-sanitizer was not found; it is part of the CUDA toolkit")
        return NOT_POSSIBLE
    command = [program, "--tool", options.tool, "--error-exitcode", str(FOUND_ERRORS)]
    # Every launch is checked by skinfast itself; the calls that torch and CUDA's libraries make to
    # find out what is there fail as they should, and would count as errors. Torch may take longer
    # to start than the tool waits; a stage has its own limit.
    command += ["--report-api-errors", "no", "--launch-timeout", "0"]
    command += ["--print-limit", "20", *only_ours(program)]
    command += [sys.executable, str(Path(__file__).with_name("small_shapes.py")), *options.ops]
    # Without torch's cache every tensor is an allocation of its own, whose end memcheck knows.
    return subprocess.run(
        command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ).returncode


def only_ours(program: str) -> list[str]:
    """The option that names skinfast's kernels, by a part of their mangled names.

    It was renamed between versions.
    """
    done = subprocess.run([program, "--help"], capture_output=True, text=True)
    text = done.stdout + done.stderr
    for option in ("--kernel-regex", "--kernel-name"):
        if option in text:
            return [option, "kns=skinfast"]
    return []


if __name__ == "__main__":
    sys.exit(main())
