"""add_relu: the ends of ResNet-50's blocks, were they not fused with the batch normalisation."""

from op_bench import OpBench, elementwise, values

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
