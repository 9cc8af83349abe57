"""What holds for every op: parity, gradients, the dispatcher's contract, layouts, determinism."""

import re
from pathlib import Path

import pytest
import torch

from skinfast import testing
from skinfast.testing import (
    RecordOps,
    assert_parity,
    in_layout,
    map_tensors,
    op_modules,
    outputs_and_gradients,
    parity_cases,
    to_dtype,
)

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "csrc" / "library.cpp"


def _id(case):
    name, _, device, dtype, layout, sample = case
    return f"{name}-{sample.name}-{device}-{str(dtype).removeprefix('torch.')}-{layout}"


CASES = list(parity_cases())
FLOAT64_CPU = [c for c in CASES if c[2] == "cpu" and c[3] == torch.float64 and c[4] == "contiguous"]


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_equals_pure_pytorch(case):
    name, module, _, dtype, layout, sample = case
    assert_parity(module, name, map_tensors(sample, lambda t: in_layout(t, layout)), dtype)


@pytest.mark.parametrize("case", [c for c in CASES if c[4] == "contiguous"], ids=_id)
def test_takes_dense_tensors_that_start_at_an_odd_element(case):
    name, module, _, dtype, _, sample = case
    assert_parity(module, name, map_tensors(sample, lambda t: in_layout(t, "offset")), dtype)


@pytest.mark.parametrize("case", FLOAT64_CPU, ids=_id)
def test_gradient_is_the_derivative(case):
    name, module, _, dtype, _, sample = case
    if any(isinstance(a, torch.Tensor) and a.numel() > 2000 for a in sample.args):
        sample = _small(module, dtype)
    function = getattr(module, name)
    sample = to_dtype(sample, torch.float64)

    def of_tensors(*args):
        result = function(*args, **sample.kwargs)
        outputs = result if isinstance(result, tuple) else (result,)
        return tuple(output for output in outputs if output.requires_grad)

    assert torch.autograd.gradcheck(of_tensors, sample.args, fast_mode=True)


def _small(module, dtype):
    samples = list(module.sample_inputs("cpu", dtype))
    return min((s for s in samples if s.args[0].numel() > 0), key=lambda s: s.args[0].numel())


@pytest.mark.parametrize(
    "case", [c for c in CASES if c[3] == torch.float32 and c[4] != "strided"], ids=_id
)
def test_keeps_the_dispatchers_contract(case):
    """opcheck on every low-level call that a forward and a backward pass make."""
    name, module, _, _, layout, sample = case
    sample = map_tensors(sample, lambda t: in_layout(t, layout))
    with RecordOps() as record:
        outputs_and_gradients(getattr(module, name), sample)
    assert record.calls
    for overload, args, kwargs in record.calls:
        torch.library.opcheck(
            overload,
            _detached(args),
            kwargs,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def _detached(args):
    return tuple(
        a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a
        for a in args
    )


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c[3] in (torch.float32, torch.bfloat16) and c[4] == "contiguous"],
    ids=_id,
)
def test_two_runs_are_equal_to_the_bit(case, monkeypatch):
    # On a GPU, for the convolutions that are cuDNN's.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    name, module, _, _, _, sample = case
    first, second = (outputs_and_gradients(getattr(module, name), sample) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value.nan_to_num(), second[key].nan_to_num()), key


@pytest.mark.parametrize(
    "case", [c for c in CASES if c[3] == torch.float32 and c[4] == "contiguous"], ids=_id
)
def test_passes_nan_and_infinity_through_as_pytorch_does(case):
    name, module, _, dtype, _, sample = case

    def spoil(tensor):
        tensor = tensor.detach().clone()
        if tensor.is_floating_point() and tensor.numel() >= 4 and tensor.requires_grad is False:
            flat = tensor.view(-1)
            flat[0], flat[tensor.numel() // 2], flat[-1] = float("nan"), float("inf"), -float("inf")
        return tensor

    first, *rest = sample.args
    spoiled = sample._replace(
        args=(spoil(first), *(r.detach() if isinstance(r, torch.Tensor) else r for r in rest))
    )
    actual = outputs_and_gradients(getattr(module, name), spoiled)["output 0"]
    expected = outputs_and_gradients(module.reference, to_dtype(spoiled, dtype))["output 0"]
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("name", op_modules())
def test_follows_autocast_as_pytorch_does(name):
    module = op_modules()[name]
    sample = _small(module, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = getattr(module, name)(*sample.args, **sample.kwargs)
        expected = module.reference(*sample.args, **sample.kwargs)
    first = [value[0] if isinstance(value, tuple) else value for value in (actual, expected)]
    assert first[0].dtype == first[1].dtype


@pytest.mark.parametrize("name", op_modules())
def test_works_under_torch_compile(name):
    module = op_modules()[name]
    sample = _small(module, torch.float32)
    compiled = torch.compile(getattr(module, name), backend="aot_eager", fullgraph=True)
    eager = outputs_and_gradients(getattr(module, name), sample)
    for key, value in outputs_and_gradients(compiled, sample).items():
        torch.testing.assert_close(value, eager[key])


@pytest.mark.parametrize("name", op_modules())
def test_refuses_tensors_on_different_devices(name):
    """The meta device stands for the second one, which not every machine has."""
    module = op_modules()[name]
    sample = _small(module, torch.float32)
    others = [i for i, a in enumerate(sample.args) if i > 0 and isinstance(a, torch.Tensor)]
    for i in others:
        args = list(sample.args)
        args[i] = args[i].detach().to("meta")
        with pytest.raises(RuntimeError, match=r"^\w+: .* on different devices; move one"):
            getattr(module, name)(*args, **sample.kwargs)


@pytest.mark.parametrize("name", op_modules())
def test_refuses_a_second_derivative(name):
    module = op_modules()[name]
    sample = _small(module, torch.float64)
    result = getattr(module, name)(*sample.args, **sample.kwargs)
    output = result[0] if isinstance(result, tuple) else result
    inputs = [a for a in sample.args if isinstance(a, torch.Tensor) and a.requires_grad]
    weight = torch.ones_like(output).requires_grad_()
    (grad, *_) = torch.autograd.grad(output, inputs, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def declared_ops():
    return re.findall(r'm\.def\(\s*"(\w+)\(', LIBRARY.read_text())


@pytest.mark.parametrize("name", declared_ops())
def test_every_declared_op_is_registered_with_a_fake_kernel(name):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"skinfast::{name}", "CPU")
    assert (
        has(f"skinfast::{name}", "Meta")
        or torch._library.simple_registry.singleton.find(f"skinfast::{name}").fake_impl.kernel
    )
    if testing.has_cuda_kernels():
        assert has(f"skinfast::{name}", "CUDA")


@pytest.mark.parametrize("folder", sorted(p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()))
def test_every_op_has_its_whole_room(folder):
    if folder in ("core", "host"):
        return
    for path in [
        f"csrc/{folder}/{folder}.h",
        f"csrc/{folder}/{folder}_cpu.cpp",
        f"csrc/{folder}/{folder}_cuda.cu",
        f"skinfast/ops/{folder}.py",
        f"tests/ops/test_{folder}.py",
        f"bench/ops/bench_{folder}.py",
    ]:
        assert (ROOT / path).is_file(), path
