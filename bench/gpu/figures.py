"""What the stages of check_gpu left behind, in a few numbers and short tables."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
MOST_FAILURES = 20


def of_pytest(junit: Path) -> Figures:
    """Counts of a JUnit file, and the first failures in the order in which they came."""
    suite = next(ElementTree.parse(junit).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "message": _message(problem)}
        for case in suite.iter("testcase")
        for problem in case
        if problem.tag in ("failure", "error")
    ]
    skipped = [
        {"test": case.get("name"), "reason": _message(problem)}
        for case in suite.iter("testcase")
        for problem in case
        if problem.tag == "skipped"
    ]
    return {**counts, "failed": failed[:MOST_FAILURES], "left out": skipped[:MOST_FAILURES]}


def _message(problem: ElementTree.Element) -> str:
    return " ".join((problem.get("message") or problem.text or "").split())[:200]


def of_selfcheck(file: Path) -> Figures:
    """How many checks ran and which ones differ."""
    checks = json.loads(file.read_text())["checks"]
    differs = [
        {name: c[name] for name in ("subject", "device", "dtype", "failure")}
        for c in checks
        if not c["passed"]
    ]
    return {
        "checks": len(checks),
        "on the GPU": sum(c["device"] == "cuda" for c in checks),
        "differ": differs[:MOST_FAILURES],
    }


def of_sanitizer(log: Path) -> Figures:
    """Errors by compute-sanitizer's own count, its first complaints, the calls that were made."""
    text = log.read_text(encoding="utf-8", errors="replace")
    count = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    complaints = re.findall(r"^=+ ((?:Error|Invalid|Race|Program hit|Warning).*)$", text, re.M)
    calls = re.findall(r"^(\d+) calls of (\d+) ops$", text, re.M)
    if not calls:
        raise ValueError("the calls did not come to their end")
    return {
        "errors": sum(int(a or b) for a, b in count) if count else "not counted",
        "calls": int(calls[-1][0]),
        "ops": int(calls[-1][1]),
        "complaints": [{"line": line[:200]} for line in complaints[:MOST_FAILURES]],
    }


def of_bench(file: Path) -> Figures:
    """A row for every row of a bench: its case, both medians, the ratio and its range."""
    result = json.loads(file.read_text())
    rows = []
    for row in result["rows"]:
        low, high = row["ratio_range"]
        case = [str(v) for k, v in row.items() if isinstance(v, (str, int)) and k not in _NO_CASE]
        rows.append(
            {
                "case": " ".join(case),
                "microseconds": row["ours"]["median"] * 1e6,
                "PyTorch's": row["pytorch"]["median"] * 1e6,
                "times as fast": round(row["ratio"], 2),
                "range": f"{low:.2f}-{high:.2f}",
                "its mode": row["mode"],
            }
            | {k: row[k] for k in ("GB/s", "ceiling") if k in row}
        )
    return {k: v for k, v in result.items() if k in ("ceilings", "rounds", "compile mode")} | {
        "rows": rows
    }


_NO_CASE = ("name", "mode", "ours_memory", "pytorch_memory", "threads", "timed with")


def of_json(file: Path) -> Figures:
    """A file that is figures already."""
    figures = json.loads(file.read_text())
    if not isinstance(figures, dict):
        raise ValueError(f"{file.name} holds no object")
    return figures


#: Of a kernel in Nsight Compute, with the words of the table.
NCU_METRICS = {
    "gpu__time_duration.sum": "microseconds",
    "dram__bytes.sum": "megabytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "arithmetic %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
}
_UNITS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6, "second": 1e6, "nsecond": 1e-3}
_UNITS |= {"usecond": 1.0, "msecond": 1e3}
_UNITS |= {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}


def of_ncu(log: Path) -> Figures:
    """The costliest launch of each kernel, from ncu's CSV of one metric a line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[tuple[str, str], dict[str, Any]] = {}
    for row in csv.DictReader(lines):
        title = NCU_METRICS.get(row["Metric Name"])
        if title is None:
            continue
        value = float(row["Metric Value"].replace(",", "")) * _UNITS.get(row["Metric Unit"], 1.0)
        name = row["Kernel Name"]
        launches.setdefault((row["ID"], name), {"kernel": base_name(name)})[title] = value
    if not launches:
        raise ValueError("ncu measured no kernel")
    costliest: dict[str, dict[str, Any]] = {}
    for launch in sorted(launches.values(), key=lambda x: -x.get("microseconds", 0.0)):
        costliest.setdefault(launch["kernel"], launch)
    return {"kernels": list(costliest.values())}


def base_name(kernel: str) -> str:
    """A demangled kernel's own name, without namespaces, template arguments and parameters."""
    plain = re.sub(r"\(anonymous namespace\)|<unnamed>", "unnamed", kernel)
    return re.split(r"[<(]", plain.removeprefix("void "))[0].split("::")[-1].strip()
