"""The record of check_gpu as a page to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: What stands in a record before its stages.
FACTS = ("device", "driver", "commit", "torch", "cuda", "python", "cpu", "started")


def is_missing(stage: Mapping[str, Any]) -> bool:
    """Whether a stage that could have run had no time, or not enough to leave anything."""
    late = stage["status"] == "out of time" and not stage.get("figures")
    return late or stage["status"] == "no time"


def page(record: Mapping[str, Any]) -> str:
    """The whole record in Markdown: every stage and why it ended, then the figures of each."""
    rehearsal = record.get("rehearsal")
    lines = ["# check_gpu" + (": a rehearsal on the CPU, no result of a GPU" if rehearsal else "")]
    if missing := [stage["name"] for stage in record["stages"] if is_missing(stage)]:
        lines += ["", f"**Incomplete: there was not time enough for {', '.join(missing)}.**"]
    if record.get("commit") == "unknown":
        lines += ["", "**Of an unknown commit: no git checkout, and --commit was not given.**"]
    lines += ["", *table(("", ""), [(name, record[name]) for name in FACTS if name in record])]
    lines += ["", f"{record['seconds']:.0f} s of at most {record['limit']:.0f} s.", ""]
    lines += table(
        ("stage", "status", "seconds", "why"),
        [
            (s["name"], s["status"], f"{s['seconds']:.0f}", s.get("reason") or s.get("unread", ""))
            for s in record["stages"]
        ],
    )
    for stage in record["stages"]:
        if stage.get("figures"):
            lines += ["", f"## {stage['name']}", "", *_figures(stage["figures"])]
    return "\n".join(lines) + "\n"


def _figures(figures: Mapping[str, Any]) -> list[str]:
    """Single values as a list, then every list of records as a table."""
    single = {k: v for k, v in figures.items() if not _is_table(v)}
    lines = [f"- {name}: {_text(value)}" for name, value in single.items()]
    for name, rows in figures.items():
        if _is_table(rows):
            titles = list(dict.fromkeys(title for row in rows for title in row))
            cells = [[_text(row.get(title, "")) for title in titles] for row in rows]
            lines += ["", f"{name}:", "", *table(titles, cells)]
    return lines


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return str(value)


def table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in rows:
        cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
