"""The time of every kernel of skinfast by itself, as the GPU's own clock has it.

python bench/gpu/kernel_times.py --output kernel_times.json

Each kernel is launched by a call of its op on the shapes that bench/ops/bench_<op>.py names.
Between two calls as many bytes are read as evict the second-level cache, so that what is measured
is held against the memory's bandwidth; what had been written would be written back at the kernel's
expense. Times come from torch.profiler, which needs no special permission.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench_ops
from figures import base_name
from harness import stopwatch
from machine import measure_ceilings
from op_bench import Kernel, OpBench
from report import run

from skinfast.errors import SkinfastError
from skinfast.training.problem import choose_device

CALLS = 12
ROUNDS = 5
EVICTING_BYTES = 2**28


def declared() -> Iterator[tuple[str, OpBench, Kernel]]:
    """Every kernel that a file in bench/ops declares, with its op."""
    for op in bench_ops.op_names():
        for kernel in bench_ops.kernels_of(op):
            yield op, bench_ops.load(op), kernel


def measure(op: OpBench, kernel: Kernel, device: torch.device, calls: int) -> list[float]:
    """Microseconds of every launch of the kernel in so many calls; of none on a CPU."""
    call = kernel.build(op, device)
    for _ in range(3):
        call()
    if device.type != "cuda":
        return []
    evict = torch.ones(EVICTING_BYTES // 4, device=device)
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            evict.sum()
            call()
        torch.cuda.synchronize(device)
    return [
        event["dur"]
        for event in trace_of(profile)
        if event.get("cat") == "kernel"
        and base_name(event["name"]) == kernel.name
        and kernel.instance in event["name"]
    ]


def trace_of(profile: torch.profiler.profile) -> list[dict[str, Any]]:
    """The profile's events in Chrome's format, which is the same in every version of torch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON after every kernel")
    parser.add_argument("--once", action="store_true", help="make the calls; measure nothing")
    parser.add_argument("--kernels", nargs="*", help="names; default: all")
    options = parser.parse_args()
    device = choose_device(options.device)
    wanted = [row for row in declared() if not options.kernels or row[2].name in options.kernels]
    if options.once:
        for _, op, kernel in wanted:
            kernel.build(op, device)()
        return
    ceilings = measure_ceilings(device, stopwatch(device), ROUNDS)
    result: dict[str, Any] = {
        "bandwidth": ceilings.bandwidth,
        "flops": ceilings.flops,
        "kernels": [],
    }
    for op, bench, kernel in wanted:
        floor = ceilings.floor(kernel.work, kernel.arithmetic) * 1e6
        row: dict[str, Any] = {"op": op, "kernel": kernel.name, "instance": kernel.instance}
        row |= {"case": kernel.case, "dtype": kernel.dtype, "floor": floor, "microseconds": None}
        try:
            times = measure(bench, kernel, device, CALLS)
        except RuntimeError as error:
            row["error"] = " ".join(str(error).split())[:200]
        else:
            if times:
                row["microseconds"] = statistics.median(times)
                row["range"] = [min(times), max(times)]
        result["kernels"].append(row)
        print(row, flush=True)
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    seen = any(row["microseconds"] is not None for row in result["kernels"])
    if device.type == "cuda" and not seen:
        raise SkinfastError("torch.profiler saw no kernel of skinfast: is CUPTI installed?")


if __name__ == "__main__":
    sys.exit(run(main))
