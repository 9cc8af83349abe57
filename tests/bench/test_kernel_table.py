"""docs/performance.md names every CUDA kernel, with what the committed results say of it."""

import json

import pytest
import summarise_kernels
import torch
from bench_ops import kernels_of, load, op_names

MEND = (
    "declare it in KERNELS of bench/ops/bench_<op>.py, then run make check-cuda and "
    "python bench/summarise_kernels.py --log build/check_cuda.log"
)


def test_every_kernel_of_csrc_is_declared_and_in_the_table():
    rooms = summarise_kernels.kernels_in_csrc()
    shown = summarise_kernels.between_marks(summarise_kernels.DOCS.read_text())
    declared = {kernel.name: op for op, kernel in summarise_kernels.declared()}
    assert rooms.keys() - declared.keys() == set(), MEND
    assert declared == {name: rooms.get(name, "no room") for name in declared}
    for name in rooms:
        assert f"| `{name}`" in shown, f"{name} is not in the table: {MEND}"


def test_the_table_is_that_of_the_committed_results():
    registers = json.loads(summarise_kernels.REGISTERS.read_text())
    table = summarise_kernels.table(summarise_kernels.newest_run(), registers)
    shown = summarise_kernels.between_marks(summarise_kernels.DOCS.read_text())
    assert shown == table, "run python bench/summarise_kernels.py"


def test_registers_are_of_kernels_that_exist_on_the_architectures_of_the_build():
    registers = json.loads(summarise_kernels.REGISTERS.read_text())
    rooms = summarise_kernels.kernels_in_csrc()
    assert registers.keys() == rooms.keys(), MEND
    for name, built in registers.items():
        file = summarise_kernels.ROOT / "csrc" / rooms[name]
        for_one = [p for p in file.glob("*_sm90.cu") if f"{name}(" in p.read_text()]
        assert built.keys() >= ({"sm_90a"} if for_one else {"sm_80", "sm_90a"}), name
        assert all(row["spilled"] == 0 and row["registers"] > 0 for row in built.values()), name


def test_kernels_are_found_however_they_are_written(tmp_path, monkeypatch):
    room = tmp_path / "csrc" / "op"
    room.mkdir(parents=True)
    (room / "op_cuda.cu").write_text(
        "// __global__ void in_a_comment(int)\ntemplate <typename T>\n"
        "__global__ void __launch_bounds__(kThreads, 2)\n    first_kernel(T* x) {}\n"
        "__global__ void second_kernel(\n    int x) {}\n"
    )
    monkeypatch.setattr(summarise_kernels, "ROOT", tmp_path)
    assert summarise_kernels.kernels_in_csrc() == {"first_kernel": "op", "second_kernel": "op"}
    (tmp_path / "csrc" / "other").mkdir()
    (tmp_path / "csrc" / "other" / "x.h").write_text("__global__ void first_kernel() {}")
    with pytest.raises(ValueError, match="first_kernel is a kernel of csrc/op and of csrc/other"):
        summarise_kernels.kernels_in_csrc()


def ptxas(symbol, architecture, spilled, registers):
    return (
        f"ptxas info    : Compiling entry function '{symbol}' for '{architecture}'\n"
        f"ptxas info    : Function properties for {symbol}\n"
        f"    {spilled} bytes stack frame, {spilled} bytes spill stores, 4 bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers\n"
    )


def test_registers_are_the_most_of_all_instances():
    log = "".join(
        [
            ptxas("_ZN8skinfast12apply_kernelIfEEvPT_", "sm_80", 0, 30),
            ptxas("_ZN8skinfast3_6712apply_kernelIdEEvPT_", "sm_80", 8, 42),
            ptxas("_ZN8skinfast12apply_kernelIfEEvPT_", "sm_90a", 0, 28),
            ptxas("_ZN8skinfast17apply_rows_kernelIfEEvPT_", "sm_90a", 0, 255),
            ptxas("_ZN3foreign14another_kernelEv", "sm_90a", 0, 99),
        ]
    )
    names = {"apply_kernel": "op", "apply_rows_kernel": "op"}
    found = summarise_kernels.registers_of(log, names)
    assert found["apply_kernel"] == {
        "sm_80": {"registers": 42, "spilled": 12, "instances": 2},
        "sm_90a": {"registers": 28, "spilled": 4, "instances": 1},
    }
    assert found["apply_rows_kernel"]["sm_90a"]["registers"] == 255
    assert len(found) == 2


def test_a_run_on_a_gpu_shows_with_its_own_rates():
    row = {"kernel": "add_relu_kernel", "instance": "", "case": "256x256x16x16"}
    figures = {
        "bandwidth": 2e12,
        "flops": {"float32": 1e13, "bfloat16": 4e13},
        "kernels": [{**row, "microseconds": 100.0}],
    }
    run = {
        "device": "Some GPU",
        "commit": "0123456789",
        "started": "2026-05-04T10:00:00+00:00",
        "stages": [
            {"name": "build", "status": "passed"},
            {"name": "kernel_times", "status": "passed", "figures": figures},
        ],
    }
    lines = summarise_kernels.table(run, {}).splitlines()
    assert lines[:2] == [
        "Last run: Some GPU, 2026-05-04, `0123456789`: build passed, kernel_times passed.",
        "Floors at 2.00 TB/s, 10 (float32) and 40 (bfloat16) TFLOP/s (as that GPU had them).",
    ]
    (line,) = [line for line in lines if line.startswith("| `add_relu_kernel`")]
    # 6 bytes for each of 2^24 values.
    assert "| 50.3 | 100 | 0.50 | not compiled |  | Some GPU, `0123456` |" in line
    assert sum(summarise_kernels.NOT_RUN in line for line in lines) == len(lines) - 6


def test_a_rehearsal_is_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(summarise_kernels, "RESULTS", tmp_path)
    record = {"stages": [], "started": "2026-01-01", "rehearsal": True}
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert summarise_kernels.newest_run() is None
    for started in ("2026-01-03", "2026-01-02"):
        record = {"stages": [], "started": started}
        (tmp_path / f"{started}.json").write_text(json.dumps(record))
    assert summarise_kernels.newest_run()["started"] == "2026-01-03"


SMALL = 2_000_000  # units; the larger calls are for a GPU


@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        pytest.param(op, kernel, id=f"{kernel.name}-{kernel.instance}")
        for op in op_names()
        for kernel in kernels_of(op)
        if kernel.units < SMALL
    ],
)
def test_the_call_that_a_kernel_is_timed_in_can_be_made(op, kernel):
    assert kernel.build(load(op), torch.device("cpu"))()
