"""batch_norm_linear: the logistic regression, all of it."""

import torch
from machine import Work
from op_bench import MATRICES, Kernel, OpBench, values


def arguments(dtype, n, features, classes):
    """The pixels need no gradient; statistics and parameters stay in float32 under autocast.

    Bytes are of three channels, and say what they stand for.
    """
    statistics = torch.zeros(features), torch.ones(features)
    norm = [values(torch.float32, features) for _ in range(2)]
    dense = values(torch.float32, classes, features), values(torch.float32, classes)
    others = (*statistics, *norm, *dense, True)
    if dtype != torch.uint8:
        return values(dtype, n, features, gradient=False), *others
    pixels = torch.randint(256, (n, features), dtype=dtype)
    return pixels, *others, 0.1, 1e-5, torch.full((3,), 0.02), torch.full((3,), -3.0)


def work(n, features, classes):
    """One read of the pixels each way; batch norm alone needs two and one."""
    flops = 2 * n * features * classes
    parameters = (2 + classes) * features
    return Work(n * features + parameters, flops), Work(n * features + 2 * parameters, flops)


BENCH = OpBench(
    name="batch_norm_linear",
    cases={"64x12288 to 7": (64, 12288, 7), "64x3072 to 7": (64, 3072, 7)},
    arguments=arguments,
    work=work,
    layouts=MATRICES,
    dtypes=("float32",),
)

_PIXELS = {
    "case": "256x12288 to 7",
    "shape": (256, 12288, 7),
    "dtype": "float32",
    "layout": "contiguous",
}
_BYTES = {**_PIXELS, "dtype": "uint8", "instance": "unsigned char", "units": 256 * 12288}
# A feature's parameters and statistics, 11 floats forward and 20 backward, serve 256 rows; 192
# blocks leave partial outputs.
KERNELS = (
    Kernel(
        "blocks_kernel",
        "value of x",
        bytes=4 + 4 * 11 / 256,
        operations=2 * 7 + 4,
        units=256 * 12288,
        **_PIXELS,
    ),
    Kernel(
        "combine_outputs_kernel",
        "partial output",
        bytes=4,
        operations=1,
        units=192 * 256 * 7,
        **_PIXELS,
    ),
    Kernel(
        "blocks_backward_kernel",
        "value of x",
        bytes=4 + 4 * 20 / 256,
        operations=2 * 7,
        units=256 * 12288,
        direction="training",
        **_PIXELS,
    ),
    Kernel("blocks_kernel", "byte of x", bytes=1 + 4 * 11 / 256, operations=2 * 7 + 4, **_BYTES),
    Kernel(
        "blocks_backward_kernel",
        "byte of x",
        bytes=1 + 4 * 20 / 256,
        operations=2 * 7,
        direction="training",
        **_BYTES,
    ),
)
