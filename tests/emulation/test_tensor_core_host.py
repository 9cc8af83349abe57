"""All of the tensor-core convolutions but the kernels: choice, layouts, padding, slices, sums.

The kernels themselves need a GPU. Here the host code that prepares their calls runs on CPU tensors,
and so does the kernel that adds the slices of a gradient (under the emulation); in place of the
tensor cores stand plain loops, or CUTLASS's own reference, fed through the mapping that the kernels
use.
"""

import ctypes
import importlib
import importlib.util
import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch
from emulated import CSRC, HERE, ROOT, TORCH_FLAGS, TORCH_LIBRARIES, build_library

import skinfast.ops  # noqa: F401 - what the stand-ins leave to other ops

LAST = torch.channels_last
KERNELS = {
    "cudnn": 0,
    "tile128x128": 1,
    "tile128x64": 2,
    "persistent128x128": 3,
    "persistent128x64": 4,
}
OPERATIONS = (
    "kForward",
    "kForwardReLU",
    "kForwardAddReLU",
    "kForwardStatistics",
    "kInputGradient",
    "kInputGradientStatistics",
    "kWeightGradient",
)
SOURCES = [
    CSRC / "add_relu" / "add_relu_cuda.cu",
    CSRC / "batch_norm_relu" / "batch_norm_relu_cuda.cu",
    CSRC / "batch_norm_relu_conv2d" / "batch_norm_relu_conv2d_cuda.cu",
    CSRC / "conv2d" / "conv2d_cuda.cu",
    CSRC / "conv2d_relu" / "conv2d_relu_cuda.cu",
    CSRC / "conv2d_add_relu" / "conv2d_add_relu_cuda.cu",
    CSRC / "conv2d_statistics" / "conv2d_statistics_cuda.cu",
    CSRC / "library.cpp",
    CSRC / "core" / "isa.cpp",
    HERE / "stand_in.cpp",
]


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cutlass_includes():
    """The headers of CUTLASS, its utilities and CUDA; None where some are missing."""
    spec = importlib.util.find_spec("cutlass_library")
    package = Path(spec.origin).parent / "source" if spec and spec.origin else Path("/nowhere")
    cutlass = Path(os.environ.get("CUTLASS_PATH", package))
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda")]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parents[1]))
    folders = [cutlass / "include", cutlass / "tools" / "util" / "include"]
    found = [Path(home) / "include" for home in homes]
    found = [folder for folder in found if (folder / "cuda_runtime.h").is_file()]
    if not found or not all(folder.is_dir() for folder in folders):
        return None
    return [*folders, found[0], found[0] / "cccl"]


class StandIn:
    """The ops on one stand-in, and how often it was called."""

    def __init__(self, name, source, flags=()):
        self.namespace = f"skinfast_{name}"
        flags = [
            *flags,
            f"-Dskinfast_emulated={self.namespace}",
            "-DSKINFAST_CUTLASS",
            "-DSKINFAST_CUTLASS_SM90",
        ]
        path = build_library(name, [*SOURCES, source], [*TORCH_FLAGS, *flags], TORCH_LIBRARIES)
        torch.ops.load_library(path)
        self.library = ctypes.CDLL(str(path))
        self.ops = getattr(torch.ops, self.namespace)

    def calls(self):
        """By operation and kernel, those that are not zero."""
        numbers = {
            (operation, kernel): self.library.stand_in_calls(i, j)
            for i, operation in enumerate(OPERATIONS)
            for kernel, j in KERNELS.items()
        }
        return {key: number for key, number in numbers.items() if number}

    def takes(self, kernel, dtype, operation, N, C, side, K, R, stride=1):
        """Whether the kernel can compute it; dtype and operation by their numbers."""
        takes = self.library.stand_in_takes
        takes.restype = ctypes.c_bool
        sizes = (ctypes.c_long(size) for size in (N, C, side, K, R, stride))
        return takes(KERNELS[kernel], dtype, operation, *sizes)

    def made(self, function):
        """The function's result, and the calls that it made."""
        before = self.calls()
        result = function()
        after = self.calls()
        return result, {k: n - before.get(k, 0) for k, n in after.items() if n != before.get(k, 0)}


@pytest.fixture(scope="module")
def plain(_compiler):
    return StandIn("stand_in_plain", HERE / "stand_in_plain.cpp")


@pytest.fixture(scope="module")
def cutlass_flags(_compiler):
    includes = cutlass_includes()
    if includes is None:
        pytest.skip("needs the headers of CUTLASS (nvidia-cutlass, CUTLASS_PATH) and of CUDA")
    # Permissive: CUTLASS's templates name device functions, which the host never calls.
    return ["-fpermissive", "-w", *(f"-isystem{folder}" for folder in includes)]


@pytest.fixture(scope="module")
def cutlass(cutlass_flags):
    return StandIn("stand_in_cutlass", HERE / "stand_in_cutlass.cpp", cutlass_flags)


@pytest.fixture(params=["plain", "cutlass"])
def stand_in(request):
    return request.getfixturevalue(request.param)


CASES = {  # x, weight, stride, padding
    "pointwise": ((3, 24, 4, 3), (16, 24, 1, 1), (1, 1), (0, 0)),
    "pointwise-1x1-map": ((5, 16, 1, 1), (8, 16, 1, 1), (1, 1), (0, 0)),
    "pointwise-strided": ((2, 16, 5, 4), (24, 16, 1, 1), (2, 2), (0, 0)),
    "3x3": ((2, 8, 5, 4), (16, 8, 3, 3), (1, 1), (1, 1)),
    "3x3-strided": ((2, 16, 6, 5), (8, 16, 3, 3), (2, 2), (1, 1)),
    "uneven": ((2, 8, 4, 6), (8, 8, 2, 3), (1, 2), (0, 1)),
    "stem": ((2, 3, 12, 10), (8, 3, 7, 7), (2, 2), (3, 3)),
    "many-slices": ((17, 8, 8, 8), (8, 8, 1, 1), (1, 1), (0, 0)),
}


def tensors_of(case, dtype=torch.bfloat16, layout=LAST):
    x, weight, stride, padding = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        values = torch.randn(shape, generator=generator).to(dtype)
        return values.contiguous(memory_format=layout) if len(shape) == 4 else values

    x, weight, bias = tensor(*x), tensor(*weight), tensor(weight[0])
    output = torch.nn.functional.conv2d(x, weight, None, stride, padding)
    return x, weight, bias, tensor(*output.shape), (stride, padding, (1, 1), 1)


def calls_of(ops, case, **options):
    """Each operation by name, on `ops`."""
    x, weight, bias, output, how = tensors_of(case, **options)
    # Of a batch norm that changes nothing, and a ReLU that lets all pass.
    mask = torch.full(((x.numel() + 7) // 8,), 255, dtype=torch.uint8)
    norm = x, mask, torch.zeros(x.size(1)), torch.ones(x.size(1)), None, False, 0.0
    return {
        "kForward": lambda: ops.conv2d(x, weight, bias, *how),
        "kForwardReLU": lambda: ops.conv2d_relu(x, weight, bias, *how),
        "kForwardAddReLU": lambda: ops.conv2d_add_relu(x, weight, bias, output, *how),
        "kForwardStatistics": lambda: ops.conv2d_statistics(x, weight, *how)[0],
        "kInputGradient": lambda: ops.conv2d_backward(output, x, weight, *how, True, False, False)[
            0
        ],
        "kInputGradientStatistics": lambda: ops.batch_norm_relu_conv2d_backward(
            output, x, weight, *norm, *how, True, False
        )[0],
        "kWeightGradient": lambda: ops.conv2d_backward(output, x, weight, *how, False, True, False)[
            1
        ],
    }


FOR_PERSISTENT_KERNELS = ("pointwise", "pointwise-1x1-map", "many-slices")


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "cudnn"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", CASES)
def test_equals_pytorch_in_float64(stand_in, monkeypatch, case, operation, kernel):
    monkeypatch.setenv("SKINFAST_CONV2D", kernel)
    actual, calls = stand_in.made(calls_of(stand_in.ops, case)[operation])
    taken = not (case == "stem" and operation.startswith("kInputGradient"))
    # conv2d_relu leaves small channels to the kernels of its room.
    small = case in ("3x3", "many-slices", "pointwise-1x1-map")
    if operation == "kForwardReLU" and small:
        taken = False
    if kernel.startswith("persistent") and case not in FOR_PERSISTENT_KERNELS:
        taken = False
    with_statistics = operation.endswith("Statistics")
    if kernel != "persistent128x64":  # the sums are by passes of their own
        operation = operation.removesuffix("Statistics")
    assert calls == ({(operation, kernel): 1} if taken else {})
    x, weight, bias, output, how = (
        t.double() if isinstance(t, torch.Tensor) else t for t in tensors_of(case)
    )
    stride, padding, *_ = how
    if operation.startswith("kForward"):
        bias = None if with_statistics else bias
        expected = torch.nn.functional.conv2d(x, weight, bias, stride, padding)
        expected = expected + output if operation == "kForwardAddReLU" else expected
        expected = expected.relu() if operation.endswith("ReLU") else expected
    else:
        wanted = [operation != "kWeightGradient", operation == "kWeightGradient", False]
        expected = torch.ops.aten.convolution_backward(
            output, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, wanted
        )[wanted.index(True)]
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=2**-9 * scale)
    assert actual.dtype == torch.bfloat16 and actual.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float32}, {"layout": torch.contiguous_format}],
    ids=["dtype", "nchw"],
)
def test_what_the_kernels_cannot_take_is_pytorchs(plain, monkeypatch, operation, options):
    monkeypatch.setenv("SKINFAST_CONV2D", "tile128x64")
    actual, calls = plain.made(calls_of(plain.ops, "3x3-strided", **options)[operation])
    assert not calls
    expected = calls_of(torch.ops.skinfast, "3x3-strided", **options)[operation]()
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_without_a_wish_the_committed_table_decides_and_its_device_is_not_this(plain):
    for call in calls_of(plain.ops, "3x3-strided").values():
        assert plain.made(call)[1] == {}


@pytest.mark.parametrize("case", FOR_PERSISTENT_KERNELS)
def test_statistics_are_those_of_the_output_in_any_order_of_threads(stand_in, monkeypatch, case):
    monkeypatch.setenv("SKINFAST_CONV2D", "persistent128x64")
    x, weight, _, _, how = tensors_of(case)
    results = []
    for seed in "01":
        monkeypatch.setenv("SKINFAST_EMULATION_SEED", seed)
        results.append(stand_in.ops.conv2d_statistics(x, weight, *how))
    (output, statistics), (_, again) = results
    assert torch.equal(statistics, again)
    values = output.double().transpose(0, 1).flatten(1)
    expected = torch.stack([values.mean(1), values.var(1, correction=0)])
    assert statistics.dtype == torch.float32
    torch.testing.assert_close(statistics.double(), expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_equal_values_have_no_negative_variance(plain, monkeypatch):
    monkeypatch.setenv("SKINFAST_CONV2D", "persistent128x64")
    x, weight = torch.ones(2000, 8, 1, 1).bfloat16(), torch.ones(8, 8, 1, 1).bfloat16()
    how = (1, 1), (0, 0), (1, 1), 1
    (_, statistics), calls = plain.made(lambda: plain.ops.conv2d_statistics(x, weight, *how))
    assert calls == {("kForwardStatistics", "persistent128x64"): 1}
    assert statistics[0].tolist() == [8.0] * 8 and statistics[1].tolist() == [0.0] * 8
    x[3] = float("nan")
    assert plain.ops.conv2d_statistics(x, weight, *how)[1].isnan().all()


def trained(ops, case, layout=LAST):
    """All gradients of a convolution of a batch norm with ReLU, on `ops`; and in float64."""
    x, weight, _, grad, how = tensors_of(case)
    generator = torch.Generator().manual_seed(1)
    norm_weight, norm_bias = (torch.randn(x.size(1), generator=generator) for _ in range(2))
    x = (3 * x + 2).contiguous(memory_format=layout)
    normalized, *saved = torch.ops.skinfast.batch_norm_relu(
        x, norm_weight, norm_bias, None, None, True, 1e-5, True, None
    )
    gradients = ops.batch_norm_relu_conv2d_backward(
        grad, normalized, weight, x, *saved, norm_weight, True, 1e-5, *how, True, True
    )
    inputs = [t.double().requires_grad_() for t in (x, weight, norm_weight, norm_bias)]
    exact = torch.nn.functional.batch_norm(inputs[0], None, None, *inputs[2:], training=True)
    exact = torch.nn.functional.conv2d(exact.relu(), inputs[1])
    return gradients, torch.autograd.grad(exact, inputs, grad.double())


@pytest.mark.parametrize("case", FOR_PERSISTENT_KERNELS)
def test_batch_norms_gradient_takes_the_sums_in_any_order_of_threads(stand_in, monkeypatch, case):
    monkeypatch.setenv("SKINFAST_CONV2D", "persistent128x64")
    results = []
    for seed in "01":
        monkeypatch.setenv("SKINFAST_EMULATION_SEED", seed)
        (gradients, expected), calls = stand_in.made(lambda: trained(stand_in.ops, case))
        gave_sums = ("kInputGradientStatistics", "persistent128x64")
        assert calls == {gave_sums: 1, ("kWeightGradient", "persistent128x64"): 1}
        results.append(gradients)
    for name, value, again, exact in zip(
        ("x", "weight", "norm_weight", "norm_bias"), *results, expected, strict=True
    ):
        assert torch.equal(value, again), name
        error = (value.double() - exact).norm() / exact.norm()
        assert error < 2**-7, f"{name}: {error}"


def test_a_batch_norm_of_another_layout_adds_up_its_own_sums(plain, monkeypatch):
    monkeypatch.setenv("SKINFAST_CONV2D", "persistent128x64")
    (gradients, expected), calls = plain.made(
        lambda: trained(plain.ops, "pointwise", torch.contiguous_format)
    )
    assert ("kInputGradientStatistics", "persistent128x64") not in calls
    for value, exact in zip(gradients, expected, strict=True):
        assert (value.double() - exact).norm() < 2**-7 * exact.norm()


def test_the_relu_mask_of_the_epilogue_reads_every_threads_own_bits(cutlass_flags):
    path = build_library("relu_mask", [HERE / "relu_mask.cpp"], cutlass_flags)
    run = ctypes.CDLL(str(path)).relu_mask_passes
    run.restype = ctypes.c_bool
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((128, 64), (5, 8), (200, 72), (300, 200)):  # of tiles of 128x64
        wanted = torch.randint(2, (rows, columns), generator=generator, dtype=torch.uint8)
        bits = (wanted.view(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)
        visits, passes = torch.zeros_like(wanted), torch.zeros_like(wanted)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (bits, visits, passes)]
        assert run(pointers[0], rows, columns, *pointers[1:])  # nothing passes beyond the output
        assert (visits == 1).all() and torch.equal(passes, wanted)


def test_persistent_kernels_are_for_the_devices_that_have_them(plain, monkeypatch):
    monkeypatch.setenv("SKINFAST_CONV2D", "persistent128x64")
    call = calls_of(plain.ops, "pointwise")["kForward"]
    here, calls = plain.made(call)
    assert calls == {("kForward", "persistent128x64"): 1}
    plain.library.stand_in_device(False)
    try:
        elsewhere, calls = plain.made(call)
    finally:
        plain.library.stand_in_device(True)
    assert calls == {}
    torch.testing.assert_close(elsewhere, here)


def test_an_unknown_kernel_is_refused_by_name(plain, monkeypatch):
    monkeypatch.setenv("SKINFAST_CONV2D", "fastest")
    with pytest.raises(RuntimeError, match=r"SKINFAST_CONV2D is fastest; .*one of: cudnn tile128x"):
        calls_of(plain.ops, "3x3-strided")["kForward"]()


def test_a_gradient_in_slices_does_not_depend_on_the_order_of_threads(plain, monkeypatch):
    monkeypatch.setenv("SKINFAST_CONV2D", "tile128x64")
    call = calls_of(plain.ops, "many-slices")["kWeightGradient"]
    assert plain.library.stand_in_slices(2, 17 * 64, 8, 8) == 4
    results = []
    for seed in "012":
        monkeypatch.setenv("SKINFAST_EMULATION_SEED", seed)
        results.append(call())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("kernel", "rows", "filters", "columns", "slices"),
    [
        (1, 65536, 64, 64, 256),  # one tile: as many slices as are long enough
        (1, 65536, 256, 64, 132),
        (1, 4096, 512, 4608, 1),  # 144 tiles
        (2, 4096, 512, 4608, 1),
        (1, 100, 64, 64, 1),  # too short to cut
        (1, 2**24, 8, 8, 264),
        (3, 2**24, 8, 8, 256),  # of one length
        (4, 65536, 256, 64, 128),
        (4, 76 * 64, 128, 512, 19),
        (3, 4801, 64, 64, 1),
    ],
)
def test_slices_fill_the_device_and_are_not_too_short(
    plain, kernel, rows, filters, columns, slices
):
    assert plain.library.stand_in_slices(kernel, rows, filters, columns) == slices


def test_sizes_that_32_bits_cannot_index_are_refused(plain):
    def takes(dtype, operation, *sizes):
        return plain.takes("tile128x64", dtype, operation, *sizes)

    bfloat16, half = 2, 3
    assert takes(bfloat16, 0, 256, 64, 16, 64, 3) and takes(half, 6, 256, 64, 16, 64, 3)
    assert not takes(0, 0, 256, 64, 16, 64, 3)  # float32
    assert not takes(bfloat16, 0, 2**16, 64, 16, 64, 3)  # 2^31 bytes
    assert takes(bfloat16, 0, 2**16 - 1, 64, 16, 64, 3)
    assert not takes(bfloat16, 0, 256, 64, 16, 60, 3)  # filters
    assert not takes(bfloat16, 4, 256, 60, 16, 64, 3)  # channels, where they cannot be padded
    assert not takes(bfloat16, 0, 0, 64, 16, 64, 3)  # empty
    assert not takes(bfloat16, 0, 2, 8, 64, 8, 33)  # taps


def test_autotune_asks_for_what_a_kernel_computes(plain):
    autotune = module_of(ROOT / "bench" / "gpu" / "autotune.py")
    dtypes = {torch.bfloat16: 2, torch.float16: 3}
    for v in autotune.convolutions(256, 64):
        assert v.H == v.W and v.padding == (v.R // 2, v.R // 2)  # what stand_in_takes takes it for
        for dtype, operation in itertools.product(dtypes, OPERATIONS):
            sizes = (v.N, v.C, v.H, v.K, v.R, v.stride[0])
            number = OPERATIONS.index(operation)
            computed = [k for k in KERNELS if plain.takes(k, dtypes[dtype], number, *sizes)]
            asked = autotune.candidates(operation, v, dtype, has_persistent_kernels=True)
            assert asked == computed, f"{operation} {dtype} {v}"
            tiles = [name for name in asked if name.startswith("tile")]
            assert autotune.candidates(operation, v, dtype, has_persistent_kernels=False) == tiles
            if v.R == 1 and v.stride == (1, 1) and dtype == torch.bfloat16:
                assert any(name.startswith("persistent") for name in asked)


def test_the_table_that_autotune_writes_is_followed(_compiler, tmp_path):
    autotune = module_of(ROOT / "bench" / "gpu" / "autotune.py")
    measured = autotune.Convolution(2, 16, 6, 5, 8, 3, 3, 3, 3, (2, 2), (1, 1))
    faster = {"cudnn": 4.0, "tile128x128": 3.0, "tile128x64": 3.5}
    slower = {"cudnn": 3.0, "tile128x128": 3.0, "tile128x64": 3.5}
    measurements = [
        autotune.Measurement("stand-in", "kBFloat16", "kForward", measured, faster),
        autotune.Measurement("stand-in", "kHalf", "kForwardReLU", measured, faster),
        autotune.Measurement("another", "kBFloat16", "kInputGradient", measured, faster),
        autotune.Measurement("stand-in", "kBFloat16", "kForwardAddReLU", measured, slower),
        autotune.Measurement(
            "stand-in", "kBFloat16", "kWeightGradient", measured, {"cudnn": 9.0, "tile128x64": 3.0}
        ),
    ]
    pointwise = autotune.Convolution(3, 24, 4, 3, 16, 1, 1, 4, 3, (1, 1), (0, 0))
    times = {"cudnn": 9.0, "persistent128x64": 3.0}
    measurements += [
        autotune.Measurement("stand-in", "kBFloat16", operation, pointwise, times)
        for operation in OPERATIONS
        if operation.endswith("Statistics")
    ]
    autotune.write(measurements, tmp_path / "times.json")
    assert autotune.read(tmp_path / "times.json") == measurements
    header = tmp_path / "conv2d" / "conv2d_choices.h"
    header.parent.mkdir()
    assert autotune.main(["--read", str(tmp_path / "times.json"), "--output", str(header)]) == 0
    ops = StandIn("stand_in_table", HERE / "stand_in_plain.cpp", flags=["-iquote", str(tmp_path)])
    made = {
        operation: ops.made(call)[1] for operation, call in calls_of(ops.ops, "3x3-strided").items()
    }
    assert made == {
        "kForward": {("kForward", "tile128x128"): 1},
        "kForwardReLU": {},  # listed for float16
        "kForwardAddReLU": {},  # cuDNN is as fast
        "kForwardStatistics": {("kForward", "tile128x128"): 1},  # not listed itself
        "kInputGradient": {},  # listed for another device
        "kInputGradientStatistics": {},
        "kWeightGradient": {("kWeightGradient", "tile128x64"): 1},
    }
    for operation, call in calls_of(ops.ops, "pointwise").items():
        listed = operation.endswith("Statistics")
        assert ops.made(call)[1] == ({(operation, "persistent128x64"): 1} if listed else {})
    x, weight, bias, _, how = tensors_of("3x3-strided")
    for images, listed in ((3, True), (4, False)):  # batches of 2 and 3 share a class
        batch = x[:1].expand(images, -1, -1, -1).contiguous(memory_format=LAST)
        _, calls = ops.made(lambda b=batch: ops.ops.conv2d(b, weight, bias, *how))
        assert bool(calls) == listed


def test_the_committed_table_is_one_that_autotune_writes():
    autotune = module_of(ROOT / "bench" / "gpu" / "autotune.py")
    text = (CSRC / "conv2d" / "conv2d_choices.h").read_text()
    empty = autotune.table([])
    lines = [line for line in text.splitlines() if not line.startswith("    {")]
    count = len(text.splitlines()) - len(lines)
    assert "\n".join(lines) + "\n" == empty.replace("Conv2dChoice, 0>", f"Conv2dChoice, {count}>")
    assert list(autotune.kernels()) == [name for name in KERNELS if name != "cudnn"]


def test_autotune_finds_resnet50s_convolutions_and_says_what_it_needs(capsys, tmp_path):
    autotune = module_of(ROOT / "bench" / "gpu" / "autotune.py")
    found = autotune.convolutions(256, 64)
    assert len(found) == 23
    stem = autotune.Convolution(256, 3, 64, 64, 64, 7, 7, 32, 32, (2, 2), (3, 3))
    assert found[0] == stem
    if not torch.cuda.is_available():
        assert autotune.main(["--output", str(tmp_path / "table.h")]) == 77
        assert capsys.readouterr().err.startswith("autotune: there is no CUDA GPU")
        assert not (tmp_path / "table.h").exists()


def test_the_table_of_kernels_counts_a_gradients_slices_as_they_are(plain):
    bench = importlib.import_module("ops.bench_conv2d")
    for kernel, (_, shape), slices in (
        (1, bench.WIDE, bench.WIDE_SLICES),
        (3, bench.POINTWISE, bench.POINTWISE_SLICES),
    ):
        n, c, side, k, r, _ = shape
        assert plain.library.stand_in_slices(kernel, n * side**2, k, c * r**2) == slices
