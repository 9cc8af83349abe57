"""Every op forward and backward on its small sample shapes, for a tool that watches each access.

python bench/gpu/small_shapes.py --device cuda
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench_ops

from skinfast import testing

# A wrong index shows in one wide and one narrow dtype; all four would take twice as long.
DTYPES = (torch.float32, torch.bfloat16)


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
                for layout in testing.LAYOUTS:
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
        torch.cuda.synchronize()
    print(f"{calls} calls of {len(ops)} ops")


if __name__ == "__main__":
    main()
