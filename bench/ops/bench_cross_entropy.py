"""cross_entropy: the loss of all three models, in float32 also under autocast."""

import torch
from op_bench import MATRICES, OpBench, elementwise, values


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
