"""add_relu: the ends of ResNet-50's blocks, were they not fused with the batch normalisation."""

from op_bench import Kernel, OpBench, elementwise, values

BENCH = OpBench(
    name="add_relu",
    cases={
        "64x256x16x16": (64, 256, 16, 16),
        "64x1024x4x4": (64, 1024, 4, 4),
        "64x2048x1x1": (64, 2048, 1, 1),
    },
    arguments=lambda dtype, *shape: (values(dtype, *shape), values(dtype, *shape)),
    # Forward reads two and writes one; backward reads gradient and output and writes one gradient.
    work=elementwise((3, 3), flops=(2, 1)),
)

_END = {"case": "256x256x16x16", "shape": (256, 256, 16, 16), "units": 256 * 256 * 16 * 16}
KERNELS = (
    Kernel("add_relu_kernel", "value of x", bytes=6, operations=2, **_END),
    Kernel(
        "add_relu_backward_kernel",
        "value of x",
        bytes=6,
        operations=1,
        direction="training",
        **_END,
    ),
)
