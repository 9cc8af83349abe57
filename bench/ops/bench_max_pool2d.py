"""max_pool2d: the CNN's three pools and ResNet-50's."""

from machine import Work
from op_bench import Kernel, OpBench, values


def arguments(dtype, n, c, side, kernel, stride, padding):
    return values(dtype, n, c, side, side), kernel, stride, padding


def work(n, c, side, kernel, stride, padding):
    """Backward reads the gradient and writes that of the input; places are not counted."""
    x = n * c * side**2
    y = n * c * ((side + 2 * padding - kernel) // stride + 1) ** 2
    return Work(x + y, y * (kernel**2 - 1)), Work(x + y, y)


BENCH = OpBench(
    name="max_pool2d",
    cases={
        "64x10x64x64 2x2": (64, 10, 64, 2, 2, 0),
        "64x10x32x32 3x3": (64, 10, 32, 3, 3, 0),
        "64x10x10x10 4x4": (64, 10, 10, 4, 4, 0),
        "64x64x32x32 3x3 stride 2": (64, 64, 32, 3, 2, 1),
        "64x64x16x16 3x3 stride 2": (64, 64, 16, 3, 2, 1),
    },
    arguments=arguments,
    work=work,
)

# ResNet-50's, channels_last: an output for 4 inputs; a byte says which of 9 it was.
_POOL = {"case": "256x64x32x32 3x3 stride 2", "shape": (256, 64, 32, 3, 2, 1)}
_TILES = {
    "case": "256x10x64x64 2x2",
    "shape": (256, 10, 64, 2, 2, 0),
    "layout": "contiguous",
}
KERNELS = (
    Kernel(
        "max_pool2d_kernel",
        "value of the output",
        bytes=4 * 2 + 2 + 1,
        operations=8,
        units=256 * 64 * 16 * 16,
        **_POOL,
    ),
    Kernel(
        "max_pool2d_backward_kernel",
        "value of x",
        bytes=2 + 3 / 4,
        operations=3,
        units=256 * 64 * 32 * 32,
        direction="training",
        **_POOL,
    ),
    # The CNN's first, in contiguous layout.
    Kernel(
        "max_pool2d_columns_kernel",
        "value of the output",
        bytes=4 * 2 + 2 + 1,
        operations=3,
        units=256 * 10 * 32 * 32,
        **_TILES,
    ),
    Kernel(
        "max_pool2d_columns_backward_kernel",
        "value of x",
        bytes=2 + 3 / 4,
        operations=1,
        units=256 * 10 * 64 * 64,
        direction="training",
        **_TILES,
    ),
)
