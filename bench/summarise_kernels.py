"""Write the table of every CUDA kernel into docs/performance.md.

python bench/summarise_kernels.py                             # from the committed results
python bench/summarise_kernels.py --log build/check_cuda.log  # with registers of make check-cuda

What a kernel has to do is declared in bench/ops/bench_<op>.py (KERNELS); its registers come from
bench/results/kernel_registers.json, its time from the newest check_gpu.json in bench/results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
REGISTERS = RESULTS / "kernel_registers.json"
DOCS = ROOT / "docs" / "performance.md"
MARKS = "<!-- CUDA kernels -->\n", "\n<!-- end of CUDA kernels -->"
NOT_RUN = "not yet run on a GPU"
NONE_RUN = "**No kernel of skinfast has run on a GPU yet.**"
#: What floors are stated for until a GPU's own rates were measured: bytes and operations a second.
ASSUMED_BANDWIDTH, ASSUMED_FLOPS = 3.0e12, {"float32": 50e12, "bfloat16": 750e12}


def kernels_in_csrc() -> dict[str, str]:
    """The room of every ``__global__`` function, by the function's name.

    Raises:
        ValueError: two rooms have a kernel of one name, which no profile could tell apart.
    """
    rooms: dict[str, str] = {}
    for path in sorted((ROOT / "csrc").glob("*/*")):
        if path.suffix not in (".cu", ".cuh", ".h"):
            continue
        for name in _global_functions(path.read_text(encoding="utf-8")):
            room = path.parent.name
            if rooms.setdefault(name, room) != room:
                raise ValueError(f"{name} is a kernel of csrc/{rooms[name]} and of csrc/{room}")
    return rooms


def _global_functions(code: str) -> Iterator[str]:
    code = re.sub(r"//.*", "", code)
    for match in re.finditer(r"__global__", code):
        head = re.sub(r"__launch_bounds__\s*\([^()]*\)", "", code[match.end() :])
        found = re.search(r"(\w+)\s*\(", head)
        if found:
            yield found[1]


def registers_of(log: str, names: Mapping[str, str]) -> dict[str, dict[str, dict[str, int]]]:
    """From ptxas's output: kernel, architecture, and the most registers and spilled bytes.

    Instances of a template are folded: the largest figure of any, and how many there are.
    """
    result: dict[str, dict[str, dict[str, int]]] = {}
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes "
        r"spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    for symbol, architecture, stores, loads, registers in entry.findall(log):
        # In a mangled symbol a name stands behind its length.
        owners = [name for name in names if re.search(f"{len(name)}{name}[IE]", symbol)]
        if len(owners) != 1:
            continue
        row = result.setdefault(owners[0], {}).setdefault(
            architecture, {"registers": 0, "spilled": 0, "instances": 0}
        )
        row["registers"] = max(row["registers"], int(registers))
        row["spilled"] = max(row["spilled"], int(stores) + int(loads))
        row["instances"] += 1
    return dict(sorted(result.items()))


def newest_run() -> dict[str, Any] | None:
    """The last committed record of check_gpu that is of a GPU; None where there is none."""
    records = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    runs = [r for r in records if "stages" in r and not r.get("rehearsal")]
    return max(runs, key=lambda run: run["started"], default=None)


def table(run: Mapping[str, Any] | None, registers: Mapping[str, Any]) -> str:
    """A row for every use of every kernel that is declared, in Markdown."""
    times, bandwidth, flops = _times(run)
    source = "as that GPU had them" if times else "assumed, as an H100 would have them"
    operations = " and ".join(f"{rate / 1e12:.0f} ({dtype})" for dtype, rate in flops.items())
    rates = f"{bandwidth / 1e12:.2f} TB/s, {operations} TFLOP/s"
    lines = [
        said_of(run),
        f"Floors at {rates} ({source}).",
        "",
        "| kernel | op | for each | bytes, operations | timed at | floor, us | measured, us "
        "| floor / measured | registers | spilled | last run |",
        f"|{'---|' * 11}",
    ]
    for op, kernel in declared():
        work, rate = kernel.work, flops[kernel.arithmetic]
        floor = max(work.bytes / bandwidth, work.flops / rate) * 1e6
        row = times.get((kernel.name, kernel.instance, kernel.case), {})
        measured = row.get("microseconds")
        built = registers.get(kernel.name, {})
        cells = [
            f"`{kernel.name}`" + (f" ({kernel.instance})" if kernel.instance else ""),
            op,
            kernel.unit,
            f"{kernel.bytes:.4g}, {kernel.operations:g}",
            f"{kernel.case} {kernel.dtype}" + (f", {kernel.conv2d}" if kernel.conv2d else ""),
            f"{floor:.3g}",
            "" if measured is None else f"{measured:.3g}",
            "" if measured is None else f"{floor / measured:.2f}",
            ", ".join(f"{a} {built[a]['registers']}" for a in sorted(built)) or "not compiled",
            str(max((v["spilled"] for v in built.values()), default="")),
            NOT_RUN
            if measured is None or run is None
            else f"{run['device']}, `{run['commit'][:7]}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def said_of(run: Mapping[str, Any] | None) -> str:
    """Where and at which commit the last run was, and how each of its stages ended."""
    if run is None:
        return NONE_RUN
    ends = ", ".join(f"{stage['name']} {stage['status']}" for stage in run["stages"])
    return f"Last run: {run['device']}, {run['started'][:10]}, `{run['commit']}`: {ends}."


def declared() -> Iterator[tuple[str, Any]]:
    """Every Kernel that a file in bench/ops declares, with its op."""
    import bench_ops

    for op in bench_ops.op_names():
        for kernel in bench_ops.kernels_of(op):
            yield op, kernel


def _times(run: Mapping[str, Any] | None) -> tuple[dict[Any, Any], float, dict[str, float]]:
    """Rows of kernel_times by kernel, instance and case; bandwidth and operations a second."""
    stages = {stage["name"]: stage for stage in run["stages"]} if run else {}
    figures = stages.get("kernel_times", {}).get("figures")
    if not figures:
        return {}, ASSUMED_BANDWIDTH, ASSUMED_FLOPS
    rows = {(r["kernel"], r["instance"], r["case"]): r for r in figures["kernels"]}
    return rows, figures["bandwidth"], figures["flops"]


def between_marks(text: str) -> str:
    """What stands in the page at present."""
    begin, end = MARKS
    return text.split(begin)[1].split(end)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, help="of make check-cuda: take the registers from it")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "bench"))
    if options.log:
        found = registers_of(options.log.read_text(errors="replace"), kernels_in_csrc())
        if not found:
            sys.exit(f"summarise_kernels: {options.log} names no kernel; run make check-cuda first")
        if missing := sorted(kernels_in_csrc().keys() - found.keys()):
            sys.exit(
                f"summarise_kernels: {options.log} has no {', '.join(missing)}; was nvidia-cutlass "
                "installed for make check-cuda?"
            )
        REGISTERS.write_text(json.dumps(found, indent=1) + "\n")
    text = DOCS.read_text(encoding="utf-8")
    begin, end = MARKS
    new = table(newest_run(), json.loads(REGISTERS.read_text()))
    DOCS.write_text(text.replace(begin + between_marks(text) + end, begin + new + end))


if __name__ == "__main__":
    main()
