"""The harness's rules, on a clock that the test winds."""

import argparse
import dataclasses
import json
from functools import partial

import harness
import machine
import pytest
import report
import torch

from skinfast.errors import SkinfastError

CPU = torch.device("cpu")


class FakeClock:
    """A stopwatch that notes who was timed and charges what the test says."""

    def __init__(self, seconds):
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        self.turns = []

    def __call__(self, call, repeats):
        name = call()
        self.turns.append((name, repeats))
        return next(self.seconds[name])


def saying(name):
    return lambda: name


def build_saying(name):
    return saying(name)


def bench_with(clock, rounds, memory=lambda build, device: None):
    return harness.Bench(CPU, rounds, clock, memory)


def contenders(*names):
    return [
        harness.Contender(name, name.startswith("ours"), partial(build_saying, name))
        for name in names
    ]


def nothing_to_check(calls):
    return None


def test_contenders_take_turns_after_the_warm_up():
    clock = FakeClock({"a": [9, 9, 1, 2, 3], "b": [9, 9, 4, 5, 6]})
    timings = harness.take_turns({"a": saying("a"), "b": saying("b")}, clock, rounds=3)
    assert [name for name, _ in clock.turns] == ["a", "a", "b", "b", *("a", "b") * 3]
    assert timings["a"].samples == [1, 2, 3]
    assert timings["b"].median == 5


def test_a_short_call_is_repeated_until_a_sample_is_long_enough():
    clock = FakeClock({"a": [9, 0.004, 1], "b": [9, 5, 1]})
    harness.take_turns({"a": saying("a"), "b": saying("b")}, clock, 1, sample_seconds=0.02)
    assert clock.turns[-2:] == [("a", 5), ("b", 1)]


def test_ratio_is_of_medians_against_the_fastest_mode_and_its_range_of_rounds():
    clock = FakeClock(
        {
            "ours": [1, 1, 2, 4, 3],
            "slow": [1, 1, 50, 50, 50],
            "fast": [1, 1, 6, 8, 7],
        }
    )
    (row,) = bench_with(clock, 3).compare("x", contenders("ours", "slow", "fast"), nothing_to_check)
    assert row.mode == "fast"
    assert row.modes == {"slow": 50, "fast": 7}
    assert row.ratio == 7 / 3
    assert row.ratio_range == (2, 3)


def test_a_slower_result_is_a_row_like_any_other():
    clock = FakeClock({"ours 1": [1, 1, 2], "ours 2": [1, 1, 8], "torch": [1, 1, 4]})
    rows = bench_with(clock, 1).compare(
        "x", contenders("ours 1", "ours 2", "torch"), nothing_to_check
    )
    assert [(row.name, row.ratio) for row in rows] == [("ours 1", 2), ("ours 2", 0.5)]


def test_nothing_is_timed_where_results_differ():
    def check(calls):
        assert calls["ours"]() == calls["torch"](), "1 is not 2"

    clock = FakeClock({})
    with pytest.raises(harness.ResultsDifferError, match=r"case: results differ.*1 is not 2"):
        bench_with(clock, 3).compare("case", contenders("ours", "torch"), check)
    assert clock.turns == []


def test_memory_is_that_of_ours_and_of_the_fastest_mode():
    def memory(build, device):
        return {"ours": 10, "fast": 20}[build.args[0]]

    clock = FakeClock({"ours": [1, 1, 2], "slow": [1, 1, 9], "fast": [1, 1, 3]})
    (row,) = bench_with(clock, 1, memory).compare(
        "x", contenders("ours", "slow", "fast"), nothing_to_check
    )
    assert (row.ours_memory, row.pytorch_memory) == (10, 20)


def test_memory_is_not_that_of_a_process_with_a_compiler():
    def memory(build, device):
        return {"ours": 10, "eager": 20}[build.args[0]]

    clock = FakeClock({"ours": [1, 1, 2], "eager": [1, 1, 9], "compiled": [1, 1, 3]})
    ours, eager, compiled = contenders("ours", "eager", "compiled")
    compiled = dataclasses.replace(compiled, compiles=True)
    bench = bench_with(clock, 1, memory)
    (row,) = bench.compare("x", [ours, eager, compiled], nothing_to_check)
    assert (row.mode, row.pytorch_memory) == ("compiled", 20)
    clock.seconds |= {"ours": iter([1, 1, 2]), "compiled": iter([1, 1, 3])}
    (row,) = bench.compare("x", [ours, compiled], nothing_to_check)
    assert row.pytorch_memory is None


def test_peak_memory_counts_what_was_freed_again_but_not_what_others_hold():
    held = torch.ones(2**24)  # 64 MiB, in this process alone
    peak = harness.peak_memory(partial(_filled_then_freed, 2**23), CPU)
    if peak is None:
        pytest.skip("no /proc here")
    # Linux adds up a thread's pages some dozens at a time.
    assert 2**25 - 2**20 <= peak < 2**25 + held.nbytes


def _filled_then_freed(elements):
    torch.ones(elements).sum()
    return int


def test_floor_is_the_larger_of_bytes_and_operations():
    ceilings = machine.Ceilings(bandwidth=10, flops={"float32": 100, "bfloat16": 200})
    assert ceilings.floor(machine.Work(bytes=20, flops=100), "float32") == 2
    assert ceilings.floor(machine.Work(bytes=20, flops=1000), "bfloat16") == 5


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(output=str(tmp_path / "result.json"), json=False)


def test_report_prints_rows_and_writes_json_and_plot(options, tmp_path, capsys):
    bench = bench_with(FakeClock({}), 2)
    result = report.Report("title", {"op": 10, "ceiling": 8}, bench, options)
    result.header("ops", "us")
    row = harness.Row(
        name="skinfast",
        mode="eager",
        ours=harness.Timing([2e-6, 4e-6]),
        pytorch=harness.Timing([1e-6, 1e-6]),
        modes={"eager": 1e-6, "compiled": 2e-6},
        ours_memory=2_000_000,
        pytorch_memory=None,
    )
    result.add({"op": "add_relu", "ceiling": 0.25}, row, "us")
    # A run that is stopped leaves the rows that it has measured.
    assert len(json.loads((tmp_path / "result.json").read_text())["rows"]) == 1
    result.finish()
    line = capsys.readouterr().out.splitlines()[-3]
    assert line.split() == (
        ["add_relu", "0.250", "3.00", "(2.00-4.00)", "1.00", "(1.00-1.00)"]
        + ["0.33", "(0.25-0.50)", "2", "-", "eager"]
    )
    record_file = json.loads((tmp_path / "result.json").read_text())
    assert record_file.keys() == {
        "title", "commit", "environment", "rounds", "load_before", "rows"
    }  # fmt: skip
    (record,) = record_file["rows"]
    assert record["ours"] == {"samples": [2e-6, 4e-6], "median": 3e-6}
    assert record["modes"] == {"eager": 1e-6, "compiled": 2e-6}
    assert (record["op"], record["ceiling"], record["pytorch_memory"]) == ("add_relu", 0.25, None)
    assert record["ratio_range"] == [0.25, 0.5]
    assert (tmp_path / "result.svg").read_text().startswith("<?xml")


def test_json_alone_goes_to_stdout(options, capsys):
    options.json, options.output = True, None
    result = report.Report("title", {}, bench_with(FakeClock({}), 2), options)
    result.header("ops", "us")
    result.finish()
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"] == []
    assert "skinfast us" in captured.err


@pytest.mark.parametrize(
    ("error", "code"),
    [(harness.ResultsDifferError("x"), 1), (SkinfastError("x"), 2), (OSError("x"), 2)],
)
def test_errors_are_one_line(error, code, capsys):
    def main():
        raise error

    assert report.run(main) == code
    assert capsys.readouterr().err == "bench: x\n"


def test_the_ceilings_of_float32_are_measured_without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    allowed = []

    def turns(calls, watch, rounds):
        allowed.append(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        return {name: harness.Timing([1.0]) for name in calls}

    monkeypatch.setattr(machine, "take_turns", turns)
    machine.measure_ceilings(CPU, FakeClock({}), 1)
    assert allowed == [False] and torch.backends.cudnn.allow_tf32


def test_float32_is_that_in_what_is_built_checked_and_timed(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    allowed = {}

    def note(what, result=1.0):
        allowed[what] = torch.backends.cudnn.allow_tf32
        return result

    sides = [harness.Contender(n, n == "ours", lambda: note("build", int)) for n in ("ours", "x")]
    bench = bench_with(lambda call, repeats: note("time"), 1)
    bench.compare("case", sides, lambda calls: note("check"))
    assert allowed == {"build": False, "check": False, "time": False}
    assert torch.backends.cudnn.allow_tf32
