"""batch_norm_linear: the logistic regression, all of it."""

import torch
from machine import Work
from op_bench import MATRICES, OpBench, values


def arguments(dtype, n, features, classes):
    """The pixels need no gradient; statistics and parameters stay in float32 under autocast."""
    statistics = torch.zeros(features), torch.ones(features)
    norm = [values(torch.float32, features) for _ in range(2)]
    dense = values(torch.float32, classes, features), values(torch.float32, classes)
    return values(dtype, n, features, gradient=False), *statistics, *norm, *dense, True


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
