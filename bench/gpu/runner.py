"""Runs commands one after another under time limits, and keeps a record that a kill can't take.

The record (JSON, and a page in Markdown beside it) is written when a stage begins and when it
ends, so whatever stops the run, what was done until then is there to be read. Imports nothing but
Python's own library: a build that is broken cannot break the record of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from summary import is_missing, page
from tools import NOT_POSSIBLE

Figures = dict[str, Any]
#: What a stage is told to end by, in turn; pytest writes its results at an interrupt.
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
#: Between two of them.
GRACE_SECONDS = 4.0
#: What the exit code says: where no stage failed, yet some had no time or left nothing.
FAILED, INCOMPLETE = 1, 3
#: A stage that would have less than this is skipped.
LEAST_SECONDS = 5.0


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: what it is called in the record; its output goes to ``<name>.log``.
        command: the program and its arguments; none where ``reason`` says that it cannot run.
        limit: seconds that it may take; less where the run's own limit is nearer.
        figures: reads what the command left, also after a failure or at the limit; raises OSError,
            ValueError, KeyError or SyntaxError where there is nothing to read.
        environment: variables of this stage alone.
        cut_short: whether what is there at the limit counts, as the rows of a benchmark do.
        needs: stages without which this one makes no sense.
        reason: why the stage is skipped, in a few words; empty: it is not.
    """

    name: str
    command: Sequence[str]
    limit: float
    figures: Callable[[], Figures] = dict
    environment: Mapping[str, str] = field(default_factory=dict)
    cut_short: bool = False
    needs: Sequence[str] = ()
    reason: str = ""


class Runner:
    """The stages of one run, and their record.

    Args:
        folder: where ``check_gpu.json``, ``check_gpu.md`` and the logs go; it is made.
        facts: of the machine, the versions and the commit, for the record.
        seconds: limit of the whole run.
        environment: variables that every stage has besides those of this process.
    """

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        seconds: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._environment = {**os.environ, **(environment or {})}
        self._started = time.monotonic()
        self._seconds = seconds
        self._stages: list[dict[str, Any]] = []
        self._record = {**facts, "limit": seconds, "seconds": 0.0, "stages": self._stages}
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def run(self, stages: Sequence[Stage]) -> int:
        """Run every stage: 0, FAILED or INCOMPLETE; 130 after an interrupt."""
        # SIGINT too: where it was ignored, as behind a shell's "&", the stages would ignore it.
        numbers = signal.SIGINT, signal.SIGTERM
        previous = [signal.signal(number, _interrupt) for number in numbers]
        try:
            for stage in stages:
                self._run(stage)
        except KeyboardInterrupt:
            # Wherever it came: before the command began, or while its figures were read, too.
            for entry in self._stages:
                if entry["status"] == "running":
                    entry["status"] = "interrupted"
            print("check_gpu: interrupted; what was done is in the record", flush=True)
            return 130
        finally:
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)
            self._write()
        if any(_is_bad(entry) for entry in self._stages):
            return FAILED
        return INCOMPLETE if any(is_missing(entry) for entry in self._stages) else 0

    def _run(self, stage: Stage) -> None:
        entry: dict[str, Any] = {
            "name": stage.name,
            "status": "running",
            "seconds": 0.0,
            "command": " ".join(stage.command),
            "cut_short": stage.cut_short,
        }
        self._stages.append(entry)
        ending = GRACE_SECONDS * (len(ENDINGS) - 1)
        left = self._seconds - (time.monotonic() - self._started) - ending
        if reason := self._reason_to_skip(stage):
            entry |= {"status": "skipped", "reason": reason}
        elif left < min(LEAST_SECONDS, stage.limit):
            entry |= {"status": "no time", "reason": "the stages before took it all"}
        else:
            entry["limit"] = min(stage.limit, left)
            self._write()
            print(f"check_gpu: {stage.name}, at most {entry['limit']:.0f} s", flush=True)
            self._measure(stage, entry)
        self._write()
        print(f"check_gpu: {stage.name}: {entry['status']} {entry.get('reason', '')}", flush=True)

    def _reason_to_skip(self, stage: Stage) -> str:
        missing = [e["name"] for e in self._stages if e["name"] in stage.needs and not _serves(e)]
        if stage.reason:
            return stage.reason
        if missing:
            return f"needs {missing[0]}, which did not pass"
        return ""

    def _measure(self, stage: Stage, entry: dict[str, Any]) -> None:
        log = self._folder / f"{stage.name}.log"
        environment = {**self._environment, **stage.environment}
        started = time.monotonic()
        try:
            with log.open("wb") as output:
                code = _call(stage.command, environment, output, entry["limit"])
        except OSError as error:
            entry |= {"status": "failed", "reason": f"the command did not start: {error}"}
            return
        finally:
            entry["seconds"] = round(time.monotonic() - started, 1)
        try:
            entry["figures"] = stage.figures()
        except (OSError, ValueError, KeyError, SyntaxError) as error:
            entry["figures"] = {}
            entry["unread"] = f"{type(error).__name__}: {error}"
        if code is None:
            entry["status"] = "out of time"
        elif code == NOT_POSSIBLE:
            entry |= {"status": "skipped", "reason": _last_line(log)}
        elif code != 0:
            entry |= {"status": "failed", "reason": f"exit code {code}: {_last_line(log)}"}
        else:
            entry["status"] = "passed"

    def _write(self) -> None:
        self._record["seconds"] = round(time.monotonic() - self._started, 1)
        _replace(self._folder / "check_gpu.json", json.dumps(self._record, indent=1) + "\n")
        _replace(self._folder / "check_gpu.md", page(self._record))


def _is_bad(entry: Mapping[str, Any]) -> bool:
    late = entry["status"] == "out of time" and not entry["cut_short"]
    return late or entry["status"] == "failed"


def _serves(entry: Mapping[str, Any]) -> bool:
    """Whether what needs this stage can run: on the rows of a bench that was cut short too."""
    late = entry["status"] == "out of time" and entry["cut_short"]
    return entry["status"] == "passed" or (late and bool(entry["figures"]))


def _last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")


def _call(
    command: Sequence[str], environment: Mapping[str, str], output: Any, limit: float
) -> int | None:
    """The exit code, or None at the limit; nothing that the command started is left running."""
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command's whole session: compilers, workers, what runs under a profiler."""
    for number in ENDINGS:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _replace(path: Path, text: str) -> None:
    """A reader finds the old text or the new one, never half of one."""
    temporary = path.with_suffix(f"{path.suffix}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
