"""What every bench prints and writes, and the options that it takes."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import Bench, ResultsDifferError, Row, Timing, peak_memory, stopwatch

from skinfast.environment import commit_of, environment
from skinfast.errors import SkinfastError
from skinfast.files import atomic_path, atomic_write_text
from skinfast.training.problem import choose_device

ROUNDS, QUICK_ROUNDS = 9, 3


class Report:
    """Prints a row as soon as it is measured; in the end writes JSON and a plot beside it.

    Args:
        columns: title and width of the columns that name a case, then any of the bench's own.
    """

    def __init__(
        self, title: str, columns: Mapping[str, int], bench: Bench, options: argparse.Namespace
    ) -> None:
        self._columns = columns
        self._options = options
        self._stream = sys.stderr if options.json else sys.stdout
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        self._result: dict[str, Any] = {
            "title": title,
            "commit": commit(),
            "environment": environment(bench.device),
            "rounds": bench.rounds,
            "load_before": load,
            "rows": [],
        }
        if load > 0.5:
            self.note(f"this machine is busy (load average {load:.1f}): times will scatter")

    def note(self, line: str = "", **facts: Any) -> None:
        """Print a line; keep facts for the JSON file."""
        self._result |= facts
        print(line, file=self._stream, flush=True)

    def header(self, heading: str, unit: str) -> None:
        """Begin a table."""
        columns = "".join(f"{title:<{width}}" for title, width in self._columns.items())
        self.note(f"\n{heading}")
        self.note(
            f"{columns}{f'skinfast {unit} (min-max)':>26}{f'PyTorch {unit} (min-max)':>26}"
            f"{'ratio (min-max)':>20}{'MB':>7}{'PyTorch':>9}  PyTorch's best mode"
        )

    def add(self, facts: dict[str, Any], row: Row, unit: str) -> None:
        """Print and keep a row; ``facts`` has a value for every column."""
        low, high = row.ratio_range
        names = "".join(f"{_text(facts[title]):<{width}}" for title, width in self._columns.items())
        self.note(
            f"{names}{_time(row.ours, unit):>26}{_time(row.pytorch, unit):>26}"
            f"{f'{row.ratio:.2f} ({low:.2f}-{high:.2f})':>20}{_megabytes(row.ours_memory):>7}"
            f"{_megabytes(row.pytorch_memory):>9}  {row.mode}"
        )
        record = {**facts, **asdict(row), "ratio": row.ratio, "ratio_range": row.ratio_range}
        for side in ("ours", "pytorch"):
            record[side]["median"] = getattr(row, side).median
        self._result["rows"].append(record)
        # Now, not in the end: a run that is stopped at a time limit leaves its rows.
        if self._options.output:
            self._write()

    def finish(self) -> None:
        """Write what was asked for."""
        if self._options.output:
            path = self._write()
            plot = f" and {self._plot(path.with_suffix('.svg'))}" if self._result["rows"] else ""
            self.note(f"\nwritten: {path}{plot}")
        if self._options.json:
            print(json.dumps(self._result, indent=2))

    def _write(self) -> Path:
        path = Path(self._options.output)
        atomic_write_text(path, json.dumps(self._result, indent=2) + "\n")
        return path

    def _plot(self, path: Path) -> Path:
        """Draw a bar for each row: its ratio, with the range over the rounds."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        rows = self._result["rows"][::-1]
        titles = [title for title in self._columns if not isinstance(rows[0][title], float)]
        names = [" ".join(str(row[title]) for title in titles) for row in rows]
        ratios = [row["ratio"] for row in rows]
        # The median's ratio can lie outside the ratios of single rounds.
        spread = [
            [max(0, row["ratio"] - row["ratio_range"][0]) for row in rows],
            [max(0, row["ratio_range"][1] - row["ratio"]) for row in rows],
        ]
        colours = ["#2b6cb0" if ratio >= 1 else "#c05621" for ratio in ratios]
        figure = Figure(figsize=(11, 1.2 + 0.24 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        # By position: a name may come twice, and matplotlib would draw both in one place.
        places = range(len(rows))
        axes.barh(places, ratios, xerr=spread, color=colours, ecolor="#888888", capsize=2)
        axes.set_yticks(places, names)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xlabel("PyTorch's best time / skinfast's time (right of 1: skinfast is faster)")
        axes.set_title(self._result["title"])
        axes.margins(y=0.01)
        with atomic_path(path) as temporary:
            FigureCanvasSVG(figure).print_svg(str(temporary))
        return path


def _time(timing: Timing, unit: str) -> str:
    factor = {"ms": 1e3, "us": 1e6}[unit]
    low, middle, high = (
        _number(seconds * factor)
        for seconds in (min(timing.samples), timing.median, max(timing.samples))
    )
    return f"{middle} ({low}-{high})"


def _number(value: float) -> str:
    """Three digits, and no fewer before the point."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(digits, 0), 6)}f}"


def _text(value: Any) -> str:
    return _number(value) if isinstance(value, float) else str(value)


def _megabytes(memory: int | None) -> str:
    return "-" if memory is None else f"{memory / 1e6:.0f}"


def commit() -> str:
    """The checkout's commit, with "-dirty" where files were changed since."""
    return commit_of(Path(__file__).resolve().parents[1]) or "unknown"


def bench_of(options: argparse.Namespace) -> Bench:
    """The bench that the command line asks for."""
    device = choose_device(options.device)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    memory = peak_memory if options.memory else lambda *_: None
    return Bench(device, rounds, stopwatch(device), memory)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every bench takes."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options.add_argument("--quick", action="store_true", help="fewer rounds and cases")
    options.add_argument("--rounds", type=int, metavar="N", help=f"default: {ROUNDS}")
    options.add_argument(
        "--no-memory", dest="memory", action="store_false", help="measure time alone: far quicker"
    )
    options.add_argument("--output", metavar="FILE", help="write JSON, and a plot (.svg) beside")
    options.add_argument("--json", action="store_true", help="print JSON; the table goes to stderr")
    return options


def run(main: Callable[[], None]) -> int:
    """Run main: 0, 1 where results differ, 2 on bad input, 130 on an interrupt."""
    try:
        main()
    except ResultsDifferError as error:
        message, code = str(error), 1
    except (SkinfastError, OSError) as error:
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    else:
        return 0
    print(f"bench: {message}", file=sys.stderr)
    return code
