"""cross_entropy: the loss of all three models, in float32 also under autocast."""

import torch
from op_bench import MATRICES, Kernel, OpBench, elementwise, values


def arguments(dtype, rows, classes):
    return values(dtype, rows, classes), torch.randint(classes, (rows,))


BENCH = OpBench(
    name="cross_entropy",
    cases={"64x7": (64, 7), "512x7": (512, 7), "256x1000": (256, 1000)},
    arguments=arguments,
    # Forward reads the logits; backward reads them again and writes their gradient.
    work=elementwise((1, 2), flops=(4, 4)),
    layouts=MATRICES,
    dtypes=("float32",),
)

_STORED = {"dtype": "float32", "layout": "contiguous"}
_ROWS = {"case": "256x7", "shape": (256, 7), **_STORED}
# Sums of 128 blocks: the rows of a batch are those of one, which needs no second kernel.
_SUMS = {"case": "4096x7", "shape": (4096, 7), "units": 128, **_STORED}
# A row: 7 logits, a target of 8 bytes, maximum and logarithm of the sum.
KERNELS = (
    Kernel("cross_entropy_kernel", "row", bytes=44, operations=28, units=256, **_ROWS),
    Kernel("reduce_kernel", "sum of a block", bytes=16, operations=2, **_SUMS),
    Kernel(
        "cross_entropy_backward_kernel",
        "row",
        bytes=72,
        operations=28,
        units=256,
        direction="training",
        **_ROWS,
    ),
)
