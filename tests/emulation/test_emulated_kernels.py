"""The CUDA kernels, run on the CPU by emulation.h: an emulated result, never a GPU's.

Every op is called as in tests/ops/test_every_op.py and held to the same rules; in addition the
results may not depend on the order of threads, and AddressSanitizer and UBSan must be content.
"""

import os
import re

import pytest
import torch
from emulated import (
    CSRC,
    HERE,
    SANITIZED,
    Emulated,
    declared_ops,
    run_pytest,
    sanitized_environment,
)

from skinfast.ops import max_pool2d
from skinfast.testing import (
    RecordOps,
    assert_parity,
    dtypes,
    in_layout,
    map_tensors,
    outputs_and_gradients,
    parity_cases,
)

# Those of a GPU; with a sanitizer, one that a thread's 16 bytes hold few of and one of many.
DTYPES = (torch.float32, torch.bfloat16) if SANITIZED else dtypes("cuda")
CASES = list(parity_cases({"cpu": DTYPES}))
SOUND = {"kernels": True}  # until a sanitizer has complained


def _id(case):
    name, _, _, dtype, layout, sample = case
    return f"{name}-{sample.name}-{str(dtype).removeprefix('torch.')}-{layout}"


# The first test, since an access out of bounds could crash the others with nothing said.
@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
def test_no_sanitizer_complains():
    """This file again, in a process with AddressSanitizer, on a library built with it and UBSan."""
    done = run_pytest(__file__, "-s", "-x", env=sanitized_environment())
    SOUND["kernels"] = done.returncode == 0
    assert SOUND["kernels"], (done.stdout + done.stderr)[-6000:]


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
def test_no_sanitizer_complains_about_the_kernels_beside_tensor_cores():
    """Those that add up slices and sums, which only the stand-ins of that file call."""
    chosen = (str(HERE / "test_tensor_core_host.py"), "-k", "order and not cutlass")
    done = run_pytest(*chosen, env=sanitized_environment())
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.usefixtures("emulated_ops")
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_equals_pure_pytorch_and_the_cpu_kernels(case):
    if not SOUND["kernels"]:
        pytest.skip("a sanitizer complained about the kernels; see test_no_sanitizer_complains")
    name, module, _, dtype, layout, sample = case
    with Emulated() as mode:
        assert_parity(module, name, map_tensors(sample, lambda t: in_layout(t, layout)), dtype)
    assert mode.calls


@pytest.mark.usefixtures("emulated_ops")
@pytest.mark.parametrize("case", [c for c in CASES if c[4] == "contiguous"], ids=_id)
def test_takes_dense_tensors_that_start_at_an_odd_element(case):
    """Where no access of 16 bytes is possible: the kernels' narrow ways."""
    name, module, _, dtype, _, sample = case
    with Emulated():
        assert_parity(module, name, map_tensors(sample, lambda t: in_layout(t, "offset")), dtype)


@pytest.mark.usefixtures("emulated_ops")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_image_out_of_range_is_nan(layout):
    """What the CPU kernel refuses, so that no test of the room can have it on both."""
    images = torch.full((3, 2, 4, 3), 7, dtype=torch.uint8)
    labels, indices = torch.tensor([5, 6, 7]), torch.tensor([1, 0, 3, 2, -1])
    scale, shift, clock = torch.ones(3), torch.zeros(3), torch.tensor([0, 1])
    result, batch_labels = torch.ops.skinfast_emulated.image_batch(
        images, labels, indices, indices, clock, 5, scale, shift, None, 0, True, False, 0.0, layout,
        torch.float32,
    )  # fmt: skip
    assert (result[[0, 2]] == 7).all()
    assert result[[1, 3, 4]].isnan().all()  # no such image, twice; beyond the end
    assert batch_labels.tolist() == [5, 0, 7, 0, 0]


@pytest.mark.usefixtures("emulated_ops")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_image_of_bytes_out_of_range_has_no_class(layout):
    images = torch.full((3, 2, 4, 3), 7, dtype=torch.uint8)
    labels, indices = torch.tensor([5, 6, 7]), torch.tensor([1, 0, 3, 2])
    scale, shift, clock = torch.ones(3), torch.zeros(3), torch.tensor([0, 1])
    result, batch_labels = torch.ops.skinfast_emulated.image_batch(
        images, labels, indices, indices, clock, 4, scale, shift, None, 0, True, False, 0.0, layout,
        torch.uint8,
    )  # fmt: skip
    assert (result[[0, 2]] == 7).all() and (result[[1, 3]] == 0).all()
    assert batch_labels.tolist() == [5, -1, 7, -1]
    logits, classes = torch.zeros(4, 8), batch_labels
    loss, *_ = torch.ops.skinfast_emulated.cross_entropy(logits, classes, None, -100, 1, 0.0)
    assert loss.isnan()


POOLS = [  # shape, window, ceil_mode
    ((2, 3, 6, 16), (2,), False),  # rows of whole vectors, before and after
    ((1, 2, 5, 24), (2,), False),  # windows end within a vector, a row is left over
    ((1, 2, 7, 40), (3,), False),  # as does a column
    ((1, 2, 8, 32), (3,), True),  # windows that hang over
    ((2, 3, 9, 16), (4,), False),
    ((1, 2, 6, 40), (4,), True),
    ((1, 3, 9, 32), (3, 2, 1), False),
    ((1, 2, 6, 48), (3, 2, 1), True),  # the last window begins in the last column
    ((1, 2, 7, 8), (3, 2, 1), False),
    ((1, 2, 10, 10), (4,), False),  # no whole vectors, for eight of 16 bits
    ((1, 2, 8, 16), (3, 1, 1), False),  # a window without constants
]


@pytest.mark.usefixtures("emulated_ops")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize(("shape", "window", "ceil_mode"), POOLS, ids=str)
def test_max_pool2d_of_rows_equals_pytorch_to_the_bit(shape, window, ceil_mode, start, dtype):
    """Small integers, so that many maxima are equal and sums are exact; NaN, infinities."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-2, 3, shape, generator=generator).double().view(-1)
    values[::7], values[1::11], values[2::5] = float("nan"), float("inf"), -float("inf")
    values = values.view(shape)
    values[:, :, :4] = -float("inf")  # whole windows
    exact = values.clone().requires_grad_()
    expected = torch.nn.functional.max_pool2d(exact, *window, ceil_mode=ceil_mode)
    feed = torch.randint(-9, 10, expected.shape, generator=generator).double()
    (expected_grad,) = torch.autograd.grad(expected, exact, feed)
    x, grad_output = (
        in_layout(t.to(dtype), "offset" if start else "contiguous") for t in (values, feed)
    )
    x.requires_grad_()
    with Emulated() as mode:
        output = max_pool2d(x, *window, ceil_mode=ceil_mode)
        (grad,) = torch.autograd.grad(output, x, grad_output)
    assert mode.calls == {"max_pool2d": 1, "max_pool2d_backward": 1}
    for actual, wanted in ((output, expected), (grad, expected_grad)):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=0, equal_nan=True)


def reached_by_samples():
    """The low-level ops that the calls above make."""
    with RecordOps() as record:
        for name, module, _, dtype, layout, sample in CASES:
            if dtype == torch.float32 and layout == "contiguous":
                outputs_and_gradients(getattr(module, name), sample)
    return {overload._schema.name.split("::")[1] for overload, _, _ in record.calls}


def rooms_beyond_samples():
    """Rooms with a low-level op that no sample reaches, such as a step of an optimizer."""
    missing = set(declared_ops()) - reached_by_samples()
    rooms = {}
    for path in sorted(CSRC.glob("*/*_cuda.cu")):
        ops = missing & set(re.findall(r'm\.impl\(\s*"(\w+)"', path.read_text()))
        if ops:
            rooms[path.parent.name] = ops
    return rooms


@pytest.mark.parametrize(("room", "ops"), rooms_beyond_samples().items())
def test_rooms_own_tests_hold(room, ops):
    """tests/ops/test_<room>.py, with every op that it calls on the emulated kernels."""
    done = run_pytest(f"tests/ops/test_{room}.py", "-p", "emulated_plugin", env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"^emulated (\w+): ", done.stdout, re.MULTILINE)) >= ops, done.stdout
