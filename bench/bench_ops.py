"""Every op against PyTorch's: microseconds, GB/s, GFLOP/s, and how near the machine's ceilings.

python bench/bench_ops.py                      # all ops
python bench/bench_ops.py conv2d_relu --quick
"""

from __future__ import annotations

import importlib
import itertools
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Bench, Call, Contender, Graphed, ResultsDifferError
from machine import Ceilings, measure_ceilings
from op_bench import Kernel, OpBench
from report import Report, bench_of, parser, run
from torch import Tensor

from skinfast.errors import SkinfastError

# A guard against timing two different computations, in the Euclidean norm: one ReLU that rounds to
# the other side of zero moves a single gradient by its whole size. The tight bounds are in tests/.
TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-1}


def op_names() -> list[str]:
    """Every op that has a file in bench/ops."""
    files = (Path(__file__).parent / "ops").glob("bench_*.py")
    return sorted(file.stem.removeprefix("bench_") for file in files)


def load(name: str) -> OpBench:
    """What bench/ops says about an op."""
    if name not in op_names():
        raise SkinfastError(f"there is no op {name!r}; choose from {', '.join(op_names())}")
    return importlib.import_module(f"ops.bench_{name}").BENCH


def kernels_of(name: str) -> tuple[Kernel, ...]:
    """The CUDA kernels of an op's room, as bench/ops declares them; some ops have none."""
    load(name)
    return getattr(importlib.import_module(f"ops.bench_{name}"), "KERNELS", ())


def build(graphed: bool, name: str, *arguments: Any) -> Call:
    """As OpBench.build, by the op's name, so that a partial of it can be pickled."""
    call = load(name).build(*arguments)
    return Graphed(call, arguments[3]) if graphed else call


def captures(contenders: list[Contender]) -> bool:
    """Whether all of them can be captured in a CUDA graph: if not, none is timed in one."""
    with suppress(RuntimeError):
        for contender in contenders:
            contender.build()()
        return True
    torch.cuda.synchronize()
    return False


def assert_equal(tolerance: float, calls: dict[str, Call]) -> None:
    """Hold the results of all calls against those of the last."""
    *_, expected = (results := {name: _numbers(call()) for name, call in calls.items()}).values()
    for name, result in results.items():
        for i, (actual, wanted) in enumerate(zip(result, expected, strict=True)):
            distance = (actual - wanted).norm() / wanted.norm().clamp_min(1e-30)
            assert distance <= tolerance, f"result {i} of {name} is off by {distance:.2g}"


def _numbers(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Copies: Adam's results are the parameters, which the next call changes."""
    return [result.detach().double() for result in results]


def contenders_of(
    op: OpBench, case: str, dtype: str, direction: str, device: torch.device, graphed: bool
) -> list[Contender]:
    """Every layout of ours and every mode of PyTorch's."""
    call = (graphed, op.name, case, dtype, direction, device)
    ours = [Contender(f"skinfast {x}", True, partial(build, *call, True, x)) for x in op.layouts]
    return ours + [Contender(x, False, partial(build, *call, False, x)) for x in op.modes]


def bench_op(name: str, bench: Bench, report: Report, ceilings: Ceilings, quick: bool) -> str:
    """Print a row for every case, dtype, pass and layout of an op; the first difference, or "".

    What differs is not timed, and nor is the rest of this op: the other ops can be all the same.
    """
    op = load(name)
    cases = list(op.cases)[:1] if quick else list(op.cases)
    passes = op.passes[-1:] if quick else op.passes
    try:
        for call in itertools.product(cases, op.dtypes, passes):
            bench_call(op, *call, bench, report, ceilings)
    except ResultsDifferError as error:
        report.note(str(error))
        return str(error)
    return ""


def bench_call(
    op: OpBench,
    case: str,
    dtype: str,
    direction: str,
    bench: Bench,
    report: Report,
    ceilings: Ceilings,
) -> None:
    """Print a row for every layout. On a GPU calls are timed in a CUDA graph, as in a step."""
    call = (op, case, dtype, direction, bench.device)
    contenders = contenders_of(*call, graphed=bench.device.type == "cuda")
    graphed = bench.device.type == "cuda" and captures(contenders)
    rows = bench.compare(
        f"{op.name} {case} {dtype}",
        contenders if graphed else contenders_of(*call, graphed=False),
        partial(assert_equal, TOLERANCES[dtype]),
    )
    work = op.work_of(case, dtype, direction)
    for row in rows:
        seconds = row.ours.median
        facts = {
            "op": op.name,
            "shape": case,
            "dtype": dtype,
            "pass": direction,
            "layout": row.name.removeprefix("skinfast "),
            "GB/s": work.bytes / seconds / 1e9,
            "GFLOP/s": work.flops / seconds / 1e9,
            "ceiling": ceilings.floor(work, dtype) / seconds,
            "timed with": "CUDA graphs" if graphed else "calls",
        }
        report.add(facts, row, "us")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(op_names())}")
    options = arguments.parse_args()
    names = options.ops or op_names()
    for name in names:
        load(name)
    bench = bench_of(options)
    torch.manual_seed(0)
    columns = {"op": 20, "shape": 26, "dtype": 9, "pass": 9, "layout": 14}
    columns |= {"GB/s": 7, "GFLOP/s": 9, "ceiling": 8}
    report = Report("skinfast's ops against PyTorch's", columns, bench, options)
    ceilings = measure_ceilings(bench.device, bench.stopwatch, bench.rounds)
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in ceilings.flops.items())
    report.note(
        f"ceilings of this machine: memory {ceilings.bandwidth / 1e9:.1f} GB/s, {rates}\n"
        "GB/s, GFLOP/s and ceiling (the floor by these rates over our time; what fits a cache can "
        "exceed 1) are skinfast's",
        ceilings={"bandwidth": ceilings.bandwidth, "flops": ceilings.flops},
    )
    report.header(f"ops on {bench.device}", "us")
    differences = [bench_op(name, bench, report, ceilings, options.quick) for name in names]
    report.finish()
    if found := "; ".join(filter(None, differences)):
        raise ResultsDifferError(found)


if __name__ == "__main__":
    sys.exit(run(main))
