"""What bench/check_gpu.sh runs: the machine's facts, then the stages of stages.py."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from runner import Runner
from stages import ROOT, Settings, stages
from tools import find_tool

SECONDS = 540.0
# In a process of its own: torch may not import, and a context of CUDA would take memory all along.
PROBE = """
import json, torch
facts = {"torch": torch.__version__, "cuda": torch.version.cuda}
if torch.cuda.is_available():
    facts |= {"device": torch.cuda.get_device_name(0), "count": torch.cuda.device_count()}
    facts["capability"] = list(torch.cuda.get_device_capability(0))
print(json.dumps(facts))
"""


def probe() -> dict[str, Any]:
    """What torch sees here.

    Raises:
        RuntimeError: torch does not import; the message is its last line.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"torch does not import: {lines[-1] if lines else 'no message'}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def first_line(*command: str, pattern: str = ".+") -> str:
    """What a program says, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    match = re.search(pattern, done.stdout)
    return match[0].strip() if done.returncode == 0 and match else "unknown"


def facts_of(seen: dict[str, Any], commit: str | None, rehearse: bool) -> dict[str, Any]:
    """What the record says of machine, versions and code."""
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(errors="replace"))
    git = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return {
        "device": "the CPU: a rehearsal" if rehearse else seen["device"],
        "rehearsal": rehearse,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": commit or first_line(*git),
        "torch": seen["torch"],
        "cuda": seen["cuda"],
        "nvcc": first_line(find_tool("nvcc") or "nvcc", "--version", pattern=r"release \S+"),
        "python": sys.version.split()[0],
        "cpu": cpu[1] if cpu else "unknown",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def environment() -> dict[str, str]:
    """Of every stage: this checkout's skinfast, then what PYTHONPATH had before."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/check_gpu.sh", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the whole run")
    parser.add_argument("--only", action="append", metavar="STAGE", help="leave out the others")
    parser.add_argument("--commit", help="where the copy that is checked is no git checkout")
    parser.add_argument("--data", type=Path, metavar="DIR", help="HAM10000, for the epochs")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny settings")
    options = parser.parse_args()
    try:
        seen = probe()
    except RuntimeError as error:
        print(f"check_gpu: {error}; install PyTorch for {sys.executable}", file=sys.stderr)
        return 2
    if "device" not in seen and not options.rehearse:
        print(
            "check_gpu: torch finds no GPU here; run this on a machine with one, or add --rehearse",
            file=sys.stderr,
        )
        return 2
    if options.data and not options.data.exists():
        print(f"check_gpu: there is no {options.data}; --data needs HAM10000", file=sys.stderr)
        return 2
    data = options.data.resolve() if options.data else None
    settings = Settings(options.output.resolve(), seen.get("capability"), options.rehearse, data)
    chosen = stages(settings)
    names = [stage.name for stage in chosen]
    if unknown := sorted(set(options.only or ()) - set(names)):
        print(f"check_gpu: no stage {unknown[0]!r}; there are {', '.join(names)}", file=sys.stderr)
        return 2
    chosen = [stage for stage in chosen if not options.only or stage.name in options.only]
    facts = facts_of(seen, options.commit, options.rehearse)
    runner = Runner(settings.folder, facts, options.seconds, environment())
    code = runner.run(chosen)
    print(f"check_gpu: written {settings.folder / 'check_gpu.md'} and check_gpu.json")
    return code


if __name__ == "__main__":
    sys.exit(main())
