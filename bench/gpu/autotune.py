"""Measures who computes ResNet-50's convolutions fastest on this GPU, and writes the answer down.

    python bench/gpu/autotune.py --output times.json
    python bench/gpu/autotune.py --read bench/results/gpu_*.json \\
        --output csrc/conv2d/conv2d_choices.h

On every convolution of the model, forward (alone, with ReLU, with addition and ReLU, with the
statistics for a batch norm and that batch norm) and for both gradients (that of the input also with
the sums for a batch norm and that batch norm's), the tensor-core kernels of skinfast that can
compute it take turns with cuDNN, each in a CUDA graph; what training in bfloat16 calls comes
first. A kernel that fails, or whose error against float32 is more than twice cuDNN's, is recorded,
is never chosen, and makes the exit code 1. The table lists those that are faster than cuDNN by more
than the noise; build again to use it. An output that ends in .h is the table, any other all times
as JSON, which is complete after every convolution. Either that is read, or a record of check_gpu,
which holds it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "bench" / "gpu")]

import torch  # noqa: E402
from harness import stopwatch, take_turns  # noqa: E402
from op_bench import computed_by  # noqa: E402
from tools import NOT_POSSIBLE  # noqa: E402
from torch import Tensor  # noqa: E402

from skinfast.models import build_model  # noqa: E402
from skinfast.nn import Conv2d  # noqa: E402
from skinfast.ops.conv2d_statistics import has_persistent_kernels, is_chosen  # noqa: E402
from skinfast.testing import LOW_PRECISION_FACTOR, full_float32, has_cuda_kernels  # noqa: E402

# The names in csrc/conv2d/conv2d_tensor_core.h.
OPERATIONS = (
    "kForward",
    "kForwardReLU",
    "kForwardAddReLU",
    "kForwardStatistics",
    "kInputGradient",
    "kInputGradientStatistics",
    "kWeightGradient",
)
# Training's batch norms stand between convolution and ReLU: these are for inference.
INFERENCE = ("kForwardReLU", "kForwardAddReLU")
DTYPES = {torch.bfloat16: "kBFloat16", torch.float16: "kHalf"}
DEVICE = "cuda"
# How much faster than cuDNN a kernel must be to be listed.
LEAST_GAIN = 1.03
CALLS_IN_A_GRAPH = 10
# Few and short, for there are hundreds of measurements: a GPU's own clock scatters little.
ROUNDS, SAMPLE_SECONDS = 3, 0.004


def kernels() -> dict[str, str]:
    """skinfast's own kernels: the name for SKINFAST_CONV2D, and that of the C++ enumerator."""
    text = (ROOT / "csrc" / "conv2d" / "conv2d_tensor_core.h").read_text(encoding="utf-8")
    found = re.findall(r'\{Conv2dKernel::(\w+), "(\w+)"', text)
    return {name: enumerator for enumerator, name in found if name != "cudnn"}


def candidates(
    operation: str, v: Convolution, dtype: torch.dtype, has_persistent_kernels: bool
) -> list[str]:
    """The kernels that can compute it (kernel_takes in csrc/conv2d/conv2d_tensor_core.h)."""
    if operation == "kInputGradient" and v.C % 8 != 0:
        return []
    if operation.endswith("Statistics"):
        without = candidates(operation.removesuffix("Statistics"), v, dtype, has_persistent_kernels)
        return [name for name in without if name == "persistent128x64"]
    is_product = v.R == v.S == 1 and v.stride == (1, 1) and v.padding == (0, 0) and v.C % 8 == 0
    persistent = has_persistent_kernels and is_product and dtype == torch.bfloat16
    return [name for name in kernels() if persistent or not name.startswith("persistent")]


class Convolution(NamedTuple):
    """x ``[N, C, H, W]``, weight ``[K, C, R, S]``, output ``[N, K, P, Q]``."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    P: int
    Q: int
    stride: tuple[int, int]
    padding: tuple[int, int]


class Measurement(NamedTuple):
    """One operation on one convolution; microseconds by kernel, cuDNN's among them."""

    device: str
    dtype: str
    operation: str
    convolution: Convolution
    times: dict[str, float]

    def choice(self) -> str | None:
        """The kernel that is faster than cuDNN, if any is."""
        best = min(self.times, key=lambda name: self.times[name])
        return best if self.times["cudnn"] >= LEAST_GAIN * self.times[best] else None


class Failure(NamedTuple):
    """A kernel that did not compute what it says that it can."""

    kernel: str
    dtype: str
    operation: str
    convolution: Convolution
    reason: str


def convolutions(batch_size: int, image_size: int) -> list[Convolution]:
    """ResNet-50's, each once; computed on the meta device."""
    with torch.device("meta"):
        model = build_model("resnet50", image_size=image_size).eval()
        images = torch.empty(batch_size, 3, image_size, image_size)
    found: dict[Convolution, None] = {}

    def note(module: Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        n, c, h, w = inputs[0].shape
        k, _, r, s = module.weight.shape
        p, q = output.shape[2:]
        found[Convolution(n, c, h, w, k, r, s, p, q, module.stride, module.padding)] = None

    for module in model.modules():
        if isinstance(module, Conv2d):
            module.register_forward_hook(note)
    model(images)
    return list(found)


def table(measurements: Sequence[Measurement]) -> str:
    """The text of csrc/conv2d/conv2d_choices.h."""
    lines = []
    for device, dtype, operation, v, times in measurements:
        kernel = Measurement(device, dtype, operation, v, times).choice()
        if kernel is None:
            continue
        sizes = ", ".join(map(str, (0, *v[1:9], *v.stride, *v.padding)))
        lines.append(
            f'    {{"{device}", DType::{dtype}, Conv2dOperation::{operation}, '
            f"{v.N.bit_length() - 1}, {{{sizes}}}, Conv2dKernel::{kernels()[kernel]}}},"
            f"  // {times[kernel]:.1f} us, cuDNN {times['cudnn']:.1f}\n"
        )
    return (
        "// Which kernel computes which convolution on which device, as measured there by\n"
        "// bench/gpu/autotune.py, which wrote this; what is not listed is cuDNN's.\n"
        "#pragma once\n\n"
        '#include "conv2d/conv2d_tensor_core.h"\n\n'
        "namespace skinfast {\n\n"
        "// clang-format off\n"
        f"inline constexpr std::array<Conv2dChoice, {len(lines)}> kConv2dChoices{{{{\n"
        f"{''.join(lines)}"
        "}};\n"
        "// clang-format on\n\n"
        "}  // namespace skinfast\n"
    )


def write(
    measurements: Sequence[Measurement], path: Path, failures: Sequence[Failure] = ()
) -> None:
    """The table, or all times as JSON; never half a file."""
    text = table(measurements)
    if path.suffix != ".h":
        lists = {"measurements": measurements, "failures": failures}
        rows = {name: [row._asdict() for row in values] for name, values in lists.items()}
        text = json.dumps(rows, indent=1) + "\n"
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read(path: Path) -> list[Measurement]:
    """What ``write`` wrote as JSON, by itself or within check_gpu.json."""
    written = json.loads(path.read_text(encoding="utf-8"))
    for stage in written.get("stages", ()):
        if stage["name"] == "autotune":
            written = stage.get("figures", {})
    result = []
    for row in written.get("measurements", ()):
        *sizes, stride, padding = row.pop("convolution")
        shape = Convolution(*sizes, tuple(stride), tuple(padding))
        result.append(Measurement(convolution=shape, **row))
    return result


class Tensors(NamedTuple):
    """Of a convolution, channels_last, in bfloat16; ``output`` is residual and gradient too."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    output: Tensor
    mask: Tensor  # a bit for each value of x


def draw(v: Convolution) -> Tensors:
    """Random ones, on the device."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    x = tensor(v.N, v.C, v.H, v.W)
    others = tensor(v.K, v.C, v.R, v.S), tensor(v.K), tensor(v.N, v.K, v.P, v.Q)
    size = ((x.numel() + 7) // 8,)
    mask = torch.randint(256, size, generator=generator, device=DEVICE, dtype=torch.uint8)
    return Tensors(x, *others, mask)


def call_of(
    operation: str, v: Convolution, tensors: Tensors, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """A call of the low-level op."""
    x, weight, bias, output = (tensor.to(dtype) for tensor in tensors[:4])
    ops, how = torch.ops.skinfast, (v.stride, v.padding, (1, 1), 1)
    if operation == "kForward":
        return lambda: ops.conv2d(x, weight, None, *how)
    if operation == "kForwardReLU":
        return lambda: ops.conv2d_relu(x, weight, bias, *how)
    if operation == "kForwardAddReLU":
        return lambda: ops.conv2d_add_relu(x, weight, bias, output, *how)
    if operation == "kForwardStatistics":

        def normalized() -> Tensor:
            """As in training: with the batch norm that takes the statistics, or computes them."""
            statistics = None
            if is_chosen(x, weight, *how):
                y, statistics = ops.conv2d_statistics(x, weight, *how)
            else:
                y = ops.conv2d(x, weight, None, *how)
            nothing = (None,) * 4
            return ops.batch_norm_relu(y, *nothing, True, 1e-5, True, statistics)[0]

        return normalized
    if operation == "kInputGradientStatistics":
        mean, variance = (torch.full((v.C,), float(i), device=DEVICE) for i in (0, 1))
        norm = x, tensors.mask, mean, variance, None, True, 1e-5
        backward = ops.batch_norm_relu_conv2d_backward
        return lambda: backward(output, x, weight, *norm, *how, True, False)[0]
    wanted = [operation == "kInputGradient", operation == "kWeightGradient", False]
    index = wanted.index(True)
    return lambda: ops.conv2d_backward(output, x, weight, *how, *wanted)[index]


def graphed(call: Callable[[], Tensor]) -> Callable[[], None]:
    """The call, several times in one CUDA graph, as a training step makes it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_IN_A_GRAPH):
            call()
    return graph.replay


def measure(
    operation: str, v: Convolution, tensors: Tensors, dtype: torch.dtype, rounds: int
) -> tuple[Measurement | None, list[Failure]]:
    """cuDNN and all kernels that are as exact, in turns, and the others; None if cuDNN fails."""
    failures = []

    def fails(kernel: str, reason: object) -> None:
        text = " ".join(str(reason).split())[:200]
        print(f"{kernel}, {operation}, {dtype}, {v}: {text}", flush=True)
        failures.append(Failure(kernel, DTYPES[dtype], operation, v, text))

    try:
        call = call_of(operation, v, tensors, dtype)
        with computed_by("cudnn"):
            torch.backends.cudnn.benchmark = False  # it is called once
            with full_float32():
                exact = call_of(operation, v, tensors, torch.float32)()
            torch.backends.cudnn.benchmark = True  # the best that cuDNN has
            allowed = LOW_PRECISION_FACTOR * (call().float() - exact).abs().max().item()
            calls = {"cudnn": graphed(call)}
    except RuntimeError as error:
        fails("cudnn", error)
        return None, failures

    def contend(kernel: str) -> None:
        try:
            with computed_by(kernel):
                error = (call().float() - exact).abs().max().item()
                if error <= allowed:
                    calls[kernel] = graphed(call)
                else:
                    fails(kernel, f"error {error:.3g} against float32; {allowed:.3g} is allowed")
        except RuntimeError as problem:
            fails(kernel, problem)

    for name in candidates(operation, v, dtype, has_persistent_kernels()):
        contend(name)
    timings = take_turns(calls, stopwatch(torch.device(DEVICE)), rounds, SAMPLE_SECONDS)
    times = {name: t.median / CALLS_IN_A_GRAPH * 1e6 for name, t in timings.items()}
    listed = ", ".join(f"{name} {time:.1f} us" for name, time in times.items())
    print(f"{operation} {DTYPES[dtype]} {v}: {listed}", flush=True)
    device = torch.cuda.get_device_name()
    return Measurement(device, DTYPES[dtype], operation, v, times), failures


def measure_all(wanted: Sequence[Convolution], rounds: int, output: Path) -> int:
    """Measure and write, what training calls first; how many kernels failed."""
    measurements: list[Measurement] = []
    failures: list[Failure] = []
    training = tuple(operation for operation in OPERATIONS if operation not in INFERENCE)
    for dtype, operations in itertools.product(DTYPES, (training, INFERENCE)):
        for v in wanted:
            tensors = draw(v)
            for operation in operations:
                if candidates(operation, v, dtype, has_persistent_kernels()):
                    measurement, failed = measure(operation, v, tensors, dtype, rounds)
                    measurements += [measurement] if measurement else []
                    failures += failed
            write(measurements, output, failures)
    chosen = sum(m.choice() is not None for m in measurements)
    print(f"{chosen} of {len(measurements)} are faster than cuDNN's; written to {output}")
    return len(failures)


def reason_not_to_run() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA GPU; the table can only be measured on one"
    if not has_cuda_kernels():
        return "skinfast was built without CUDA kernels; see `skinfast info`"
    from skinfast import _host

    built = _host.build_info()["cutlass"]
    return None if built.startswith("CUTLASS") else f"skinfast has no tensor-core kernels: {built}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="the table (.h) or times (.json)"
    )
    parser.add_argument(
        "--read", type=Path, nargs="+", help="take these times instead of measuring"
    )
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    if options.read:
        write([row for path in options.read for row in read(path)], options.output)
        return 0
    if reason := reason_not_to_run():
        print(f"autotune: {reason}", file=sys.stderr)
        return NOT_POSSIBLE
    wanted = dict.fromkeys(
        v
        for batch in options.batch_sizes
        for size in options.image_sizes
        for v in convolutions(batch, size)
    )
    if failed := measure_all(list(wanted), options.rounds, options.output):
        print(f"autotune: {failed} calls of kernels failed or differ from float32; see above")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
