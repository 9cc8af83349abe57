"""Every op forward and backward on its small sample shapes, for a tool that watches each access.

The tensor-core kernels as well, each by its name, where this build has them.

python bench/gpu/small_shapes.py --device cuda
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import autotune
import bench_ops
from autotune import Convolution

from skinfast import testing
from skinfast.ops.conv2d_statistics import has_persistent_kernels

# A wrong index shows in one wide and one narrow dtype; all four would take twice as long.
DTYPES = (torch.float32, torch.bfloat16)
# A view that starts at an odd element takes the paths without wide accesses.
LAYOUTS = (*testing.LAYOUTS, "offset")
# Of the tensor-core kernels: tiles that are cut, two of them; a stride; channels that are padded.
CONVOLUTIONS = (
    Convolution(5, 72, 7, 5, 40, 1, 1, 7, 5, (1, 1), (0, 0)),
    Convolution(3, 16, 9, 6, 24, 3, 3, 5, 3, (2, 2), (1, 1)),
    Convolution(2, 3, 16, 16, 64, 7, 7, 8, 8, (2, 2), (3, 3)),
)


def call_tensor_cores() -> int:
    """Every tensor-core kernel on all that it can compute of CONVOLUTIONS; how many calls."""
    calls = 0
    for v, operation, dtype in itertools.product(
        CONVOLUTIONS, autotune.OPERATIONS, autotune.DTYPES
    ):
        call = None
        for kernel in autotune.candidates(operation, v, dtype, has_persistent_kernels()):
            call = call or autotune.call_of(operation, v, autotune.draw(v), dtype)
            with autotune.computed_by(kernel):
                call()
            calls += 1
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", help="default: all")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    calls, ops = 0, set()
    for name, module in testing.op_modules().items():
        if options.ops and name not in options.ops:
            continue
        ops.add(name)
        for dtype in DTYPES:
            for sample in module.sample_inputs(options.device, dtype):
                for layout in LAYOUTS:
                    stored = testing.map_tensors(
                        sample, lambda t, layout=layout: testing.in_layout(t, layout)
                    )
                    testing.outputs_and_gradients(getattr(module, name), stored)
                    calls += 1
    # The ops without a reference of their own: as their benches call them.
    for name in sorted(set(bench_ops.op_names()) - testing.op_modules().keys()):
        if options.ops and name not in options.ops:
            continue
        ops.add(name)
        op = bench_ops.load(name)
        for dtype in op.dtypes:
            for layout in op.layouts:
                call = list(op.cases)[-1], dtype, op.passes[-1]
                op.build(*call, torch.device(options.device), True, layout)()
                calls += 1
    if options.device.startswith("cuda"):
        if not autotune.reason_not_to_run() and (not options.ops or "conv2d" in options.ops):
            calls += call_tensor_cores()
        torch.cuda.synchronize()
    print(f"{calls} calls of {len(ops)} ops")


if __name__ == "__main__":
    main()
