"""conv2d: ResNet-50's convolutions in its late stages, and one that is left to PyTorch's."""

from typing import Any

from machine import Work
from op_bench import MAPS, Kernel, OpBench, values
from ops.bench_conv2d_statistics import gradient, statistics


def arguments(dtype, n, c, side, k, r, stride):
    return values(dtype, n, c, side, side), values(dtype, k, c, r, r), None, stride, r // 2


def work(n, c, side, k, r, stride):
    """Products with padding count, as they do for a library that computes them."""
    out = (side - 1) // stride + 1
    x, y, weight = n * c * side**2, n * k * out**2, k * c * r**2
    flops = 2 * y * c * r**2
    return Work(x + y + weight, flops), Work(2 * y + 2 * x + 2 * weight, 2 * flops)


BENCH = OpBench(
    name="conv2d",
    cases={
        "64x64x16x16 256 of 1x1": (64, 64, 16, 256, 1, 1),
        "64x256x4x4 1024 of 1x1": (64, 256, 4, 1024, 1, 1),
        "64x1024x4x4 2048 of 1x1 stride 2": (64, 1024, 4, 2048, 1, 2),
        "64x512x2x2 512 of 3x3": (64, 512, 2, 512, 3, 1),
        "64x2048x1x1 512 of 1x1": (64, 2048, 1, 512, 1, 1),
        "64x512x1x1 512 of 3x3": (64, 512, 1, 512, 3, 1),
        "64x64x16x16 64 of 3x3": (64, 64, 16, 64, 3, 1),
    },
    arguments=arguments,
    work=work,
    layouts=MAPS,
)

# The stages of ResNet-50 that the kernels are timed in: name of the case and shape.
WIDE = "256x128x8x8 128 of 3x3", (256, 128, 8, 128, 3, 1)
STRIDED = "256x256x8x8 512 of 1x1 stride 2", (256, 256, 8, 512, 1, 2)
POINTWISE = "256x64x16x16 256 of 1x1", (256, 64, 16, 256, 1, 1)
# Float32 sums of the weights' gradient (weight_gradient_slices in conv2d_tensor_core.h).
WIDE_SLICES, POINTWISE_SLICES = 29, 128


def convolution(
    name: str, kernel: str, stage: tuple[str, tuple[int, ...]], slices: int = 0, **others: Any
) -> Kernel:
    """A pass of a convolution in bfloat16 on tensor cores: each value is moved once.

    Args:
        name: of the ``__global__`` function.
        kernel: for SKINFAST_CONV2D.
        stage: one of those above.
        slices: of a weights' gradient: so often it is written, in float32.
        others: fields of Kernel, and ``also``: bytes for each value of the output, beyond input,
            weights and output.
    """
    case, (n, c, side, k, r, stride) = stage
    out = (side - 1) // stride + 1
    outputs = n * k * out**2
    weights = k * c * r**2
    moved = 2 * (n * c * side**2 + outputs) + (4 * slices * weights or 2 * weights)
    return Kernel(
        name,
        "value of the output",
        bytes=moved / outputs + others.pop("also", 0),
        operations=2 * c * r**2,
        units=outputs,
        case=case,
        shape=(n, c, side, k, r, stride),
        arithmetic="bfloat16",
        conv2d=kernel,
        **others,
    )


KERNELS = (
    Kernel(
        "sum_slices_kernel",
        "partial weight",
        bytes=4,
        operations=1,
        units=WIDE_SLICES * 128 * 128 * 9,
        case=WIDE[0],
        shape=WIDE[1],
        direction="training",
        conv2d="tile128x128",
    ),
    convolution("conv2d_forward_kernel", "tile128x128", WIDE),
    convolution("conv2d_input_gradient_kernel", "tile128x128", WIDE, direction="training"),
    convolution("conv2d_input_gradient_kernel", "tile128x64", STRIDED, direction="training"),
    convolution(
        "conv2d_weight_gradient_kernel", "tile128x128", WIDE, WIDE_SLICES, direction="training"
    ),
    convolution("persistent_forward_kernel", "persistent128x128", POINTWISE),
    # With two sums of each tile of 128 rows and each column.
    convolution(
        "persistent_statistics_kernel",
        "persistent128x64",
        POINTWISE,
        also=8 / 128,
        call=statistics,
    ),
    convolution(
        "persistent_input_gradient_kernel", "persistent128x128", POINTWISE, direction="training"
    ),
    # With the batch norm's x, the bits of its ReLU and those sums, for each value of the input.
    convolution(
        "persistent_input_gradient_statistics_kernel",
        "persistent128x64",
        POINTWISE,
        also=(2 + 1 / 8 + 8 / 128) * 64 / 256,
        call=gradient,
    ),
    convolution(
        "persistent_weight_gradient_kernel",
        "persistent128x128",
        POINTWISE,
        POINTWISE_SLICES,
        direction="training",
    ),
)
