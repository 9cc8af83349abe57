"""The tensor-core kernels themselves, each asked for by name. They need a GPU.

What prepares their calls is tested on every machine, by tests/emulation/test_tensor_core_host.py.
"""

import copy

import pytest
import torch

from skinfast import testing
from skinfast.models import build_model
from skinfast.ops import conv2d, conv2d_add_relu, conv2d_relu, conv2d_statistics
from skinfast.ops.batch_norm_relu_conv2d import batch_norm_relu_conv2d, reference
from skinfast.ops.conv2d_statistics import has_persistent_kernels, is_chosen


def missing():
    if not testing.has_cuda_kernels() or not torch.cuda.is_available():
        return "needs a GPU, and a build with CUDA kernels"
    from skinfast import _host

    built = _host.build_info()["cutlass"]
    return "" if built.startswith("CUTLASS") else f"tensor-core kernels: {built}"


PERSISTENT = ("persistent128x128", "persistent128x64")
pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")

# x, weight, stride, padding: ResNet-50's kinds, tiles that are full, cut, and smaller than one.
CASES = {
    "pointwise": ((8, 64, 16, 16), (256, 64, 1, 1), 1, 0),
    "pointwise-narrow": ((5, 72, 7, 3), (40, 72, 1, 1), 1, 0),
    "pointwise-1x1-map": ((76, 512, 1, 1), (2048, 512, 1, 1), 1, 0),
    "pointwise-many-tiles": ((64, 64, 16, 16), (256, 64, 1, 1), 1, 0),
    "pointwise-shallow": ((9, 8, 5, 3), (8, 8, 1, 1), 1, 0),
    "pointwise-strided": ((8, 256, 15, 16), (512, 256, 1, 1), 2, 0),
    "3x3": ((8, 128, 8, 8), (128, 128, 3, 3), 1, 1),
    "3x3-1x1-map": ((33, 512, 1, 1), (512, 512, 3, 3), 1, 1),
    "3x3-strided": ((9, 128, 16, 15), (128, 128, 3, 3), 2, 1),
    "3x3-strided-2x2-map": ((16, 512, 2, 2), (512, 512, 3, 3), 2, 1),
    "uneven": ((3, 16, 9, 6), (24, 16, 2, 3), (1, 2), (0, 1)),
    "stem": ((16, 3, 64, 64), (64, 3, 7, 7), 2, 3),
}
OPS = {
    "conv2d": lambda x, w, b, r, *how: conv2d(x, w, b, *how),
    "conv2d_relu": lambda x, w, b, r, *how: conv2d_relu(x, w, b, *how),
    "conv2d_add_relu": conv2d_add_relu,
}


def run(op, case, dtype, bias=True):
    """Output and all gradients, from values that bfloat16 and float16 hold exactly."""
    x_shape, w_shape, stride, padding = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        values = torch.randint(-8, 9, shape, generator=generator).to("cuda", dtype) / 8
        if len(shape) == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        return values.requires_grad_()

    x, w, b = tensor(*x_shape), tensor(*w_shape), tensor(w_shape[0]) if bias else None
    shape = torch.nn.functional.conv2d(x, w, None, stride, padding).shape
    residual, grad = tensor(*shape), tensor(*shape).detach()
    output = OPS[op](x, w, b, residual, stride, padding)
    return [output.detach(), *torch.autograd.grad(output, [x, w], grad)]


@pytest.mark.parametrize("kernel", ["tile128x128", "tile128x64", *PERSISTENT])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_twice_that_of_cudnn(monkeypatch, case, op, dtype, kernel):
    monkeypatch.setenv("SKINFAST_CONV2D", "cudnn")
    exact, theirs = run(op, case, torch.float64), run(op, case, dtype)
    monkeypatch.setenv("SKINFAST_CONV2D", kernel)
    ours, again = run(op, case, dtype), run(op, case, dtype)
    for name, value, same, cudnn, wanted in zip(
        ("output", "grad_x", "grad_weight"), ours, again, theirs, exact, strict=True
    ):
        assert torch.equal(value, same), f"{name}: two runs differ"
        errors = [(t.double() - wanted).abs().max().item() for t in (value, cudnn)]
        assert errors[0] <= testing.LOW_PRECISION_FACTOR * errors[1], f"{name}: {errors}"


@pytest.mark.parametrize("bias", [True, False])
def test_the_kernel_that_was_asked_for_is_the_one_that_runs(monkeypatch, bias):
    monkeypatch.setenv("SKINFAST_CONV2D", "tile128x64")
    with torch.profiler.profile() as profile:
        run("conv2d_relu", "3x3", torch.bfloat16, bias)
    names = " ".join(event.key for event in profile.key_averages())
    assert "ImplicitGemmConvolutionWithFusedEpilogue" in names


@pytest.mark.parametrize("kernel", PERSISTENT)
@pytest.mark.parametrize("op", OPS)
def test_the_persistent_kernel_runs_where_the_device_has_it(monkeypatch, op, kernel):
    monkeypatch.setenv("SKINFAST_CONV2D", kernel)
    with torch.profiler.profile() as profile:
        run(op, "pointwise", torch.bfloat16)
    names = [event.key for event in profile.key_averages()]
    ours = [name for name in names if "GemmUniversal<cute::tuple<int, int, int, int>" in name]
    # Forward and both gradients.
    assert len(ours) == (3 if has_persistent_kernels() else 0)


@pytest.mark.parametrize("kernel", ["tile128x64", *PERSISTENT])
def test_nan_and_infinity_pass_through(monkeypatch, kernel):
    monkeypatch.setenv("SKINFAST_CONV2D", kernel)
    x = torch.ones(2, 8, 4, 4, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[1, 0, 3, 3] = float("nan"), float("inf")
    weight = torch.ones(8, 8, 1, 1, device="cuda", dtype=torch.bfloat16)
    output = conv2d_relu(x, weight.contiguous(memory_format=torch.channels_last).repeat(3, 1, 1, 1))
    assert output[0, :, 0, 0].isnan().all() and output.isnan().sum() == 24
    assert output[1, :, 3, 3].isinf().all() and output.isinf().sum() == 24


POINTWISE = [name for name in CASES if name.startswith("pointwise") and name[-7:] != "strided"]


@pytest.mark.parametrize("case", POINTWISE)
def test_statistics_are_those_of_the_output(monkeypatch, case):
    if not has_persistent_kernels():
        pytest.skip("needs a GPU of compute capability 9.0, and a build for sm_90a")
    x_shape, w_shape, *_ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator)
        .to("cuda", torch.bfloat16)
        .contiguous(memory_format=torch.channels_last)
        for shape in (x_shape, w_shape)
    )
    monkeypatch.setenv("SKINFAST_CONV2D", "persistent128x64")
    assert is_chosen(x, weight, (1, 1), (0, 0), (1, 1), 1)
    (output, statistics), (same, again) = (conv2d_statistics(x, weight) for _ in range(2))
    assert torch.equal(output, same) and torch.equal(statistics, again)
    exact = conv2d(x.double(), weight.double())
    torch.testing.assert_close(output.double(), exact, rtol=2**-7, atol=1e-2)
    values = exact.transpose(0, 1).flatten(1)
    expected = torch.stack([values.mean(1), values.var(1, correction=0)])
    torch.testing.assert_close(statistics.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", POINTWISE)
def test_the_gradient_that_takes_its_sums_from_the_convolution_is_as_exact(monkeypatch, case):
    if not has_persistent_kernels():
        pytest.skip("needs a GPU of compute capability 9.0, and a build for sm_90a")
    x_shape, w_shape, *_ = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        values = torch.randn(shape, generator=generator).to("cuda", torch.bfloat16)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    x, weight = 2 * tensor(*x_shape) + 1, tensor(*w_shape)
    norm_weight, norm_bias = tensor(x_shape[1]), tensor(x_shape[1])
    grad = tensor(x_shape[0], w_shape[0], *x_shape[2:])

    def gradients(function, kernel, dtype):
        monkeypatch.setenv("SKINFAST_CONV2D", kernel)
        inputs = [t.to(dtype).requires_grad_() for t in (x, norm_weight, norm_bias, weight)]
        output = function(inputs[0], None, None, *inputs[1:], training=True)
        return torch.autograd.grad(output, inputs, grad.to(dtype))

    ours = batch_norm_relu_conv2d
    exact = gradients(reference, "cudnn", torch.float64)
    separate = gradients(ours, "cudnn", torch.bfloat16)
    with torch.profiler.profile() as profile:
        fused = gradients(ours, "persistent128x64", torch.bfloat16)
    names = " ".join(event.key for event in profile.key_averages())
    assert "combine_statistics_kernel" in names and "BackwardReduction" not in names
    again = gradients(ours, "persistent128x64", torch.bfloat16)
    for name, value, same, theirs, wanted in zip(
        ("x", "norm_weight", "norm_bias", "weight"), fused, again, separate, exact, strict=True
    ):
        assert torch.equal(value, same), f"{name}: two runs differ"
        errors = [(t.double() - wanted).norm().item() for t in (value, theirs)]
        assert errors[0] <= testing.LOW_PRECISION_FACTOR * errors[1], f"{name}: {errors}"


def test_a_model_whose_batch_norms_take_these_statistics_is_as_exact(monkeypatch):
    if not has_persistent_kernels():
        pytest.skip("needs a GPU of compute capability 9.0, and a build for sm_90a")
    torch.manual_seed(0)
    model = build_model("resnet50", image_size=64).train()
    model.layer2, model.layer3, model.layer4 = model.layer2[:1], model.layer3[:1], model.layer4[:1]
    images = torch.randn(64, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)

    def step(kernel, dtype):
        monkeypatch.setenv("SKINFAST_CONV2D", kernel)
        twin = copy.deepcopy(model).to("cuda", dtype).to(memory_format=torch.channels_last)
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=dtype != torch.float64)
        with testing.RecordOps() as record, autocast:
            result = twin(images.to(dtype))
        result.double().square().sum().backward()
        gradient = torch.cat([p.grad.double().flatten() for p in twin.parameters()])
        names = [call[0]._schema.name.removeprefix("skinfast::") for call in record.calls]
        return (result.double(), gradient), names

    exact, _ = step("cudnn", torch.float64)
    theirs, plain = step("cudnn", torch.float32)
    ours, fused = step("persistent128x64", torch.float32)
    # Of the two 1x1 convolutions in each of six blocks, one is an op with the batch norm before it.
    for name in ("conv2d_statistics", "batch_norm_relu_conv2d"):
        assert plain.count(name) == 0 and fused.count(name) == 6
    for what, value, other, wanted in zip(("logits", "gradient"), ours, theirs, exact, strict=True):
        errors = [(t - wanted).norm().item() for t in (value, other)]
        assert errors[0] <= testing.LOW_PRECISION_FACTOR * errors[1], f"{what}: {errors}"
