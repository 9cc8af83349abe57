"""global_average_pool2d: the end of ResNet-50's convolutions, at 64x64, 32x32 and 224x224."""

from machine import Work
from op_bench import Kernel, OpBench, values


def arguments(dtype, *shape):
    return (values(dtype, *shape),)


def work(n, c, height, width):
    """Forward reads the maps, backward writes their gradient; the means are written and read."""
    x, means = n * c * height * width, n * c
    return Work(x + means, x), Work(x + means, means)


BENCH = OpBench(
    name="global_average_pool2d",
    cases={
        "64x2048x2x2": (64, 2048, 2, 2),
        "64x2048x1x1": (64, 2048, 1, 1),
        "16x2048x7x7": (16, 2048, 7, 7),
    },
    arguments=arguments,
    work=work,
)

_END = {"case": "256x2048x2x2", "shape": (256, 2048, 2, 2), "units": 256 * 2048}
_LARGE = {"case": "256x256x16x16", "shape": (256, 256, 16, 16), "units": 256 * 256}
_BACKWARD = {"unit": "mean", "bytes": 2 + 4 * 2, "operations": 1, "direction": "training"}
KERNELS = (
    Kernel("average_channels_kernel", "mean", bytes=4 * 2 + 2, operations=4, **_END),
    Kernel(
        "average_tiles_kernel", "mean", bytes=4 * 2 + 2, operations=4, layout="contiguous", **_END
    ),
    Kernel(
        "average_maps_kernel",
        "mean",
        bytes=256 * 2 + 2,
        operations=256,
        layout="contiguous",
        **_LARGE,
    ),
    Kernel("spread_channels_kernel", **_BACKWARD, **_END),
    Kernel("spread_maps_kernel", layout="contiguous", **_BACKWARD, **_END),
)
