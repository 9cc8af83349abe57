"""Builds the CUDA kernels for the CPU (emulation.h) and runs skinfast's ops on them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent
BUILD = ROOT / "build" / f"emulation-{torch.__version__}".replace("+", "-")
JOBS = 2

# Set for a process that runs with AddressSanitizer preloaded (sanitized_environment).
SANITIZED = os.environ.get("SKINFAST_EMULATION_SANITIZED") == "1"
# Orders of blocks, warps and lanes that a call is made in; each call has new ones.
ORDERS = 1 if SANITIZED else 2

FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
FLAGS += [
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    f"-I{CSRC}",
    f"-I{HERE}",
    "-DSKINFAST_EMULATION",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
SANITIZE += ["-fno-omit-frame-pointer"]
TORCH_FLAGS = ["-DSKINFAST_HOST_CODE", "-DSKINFAST_NAMESPACE=skinfast_emulated"]
TORCH_FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{TORCH / 'include'}"]
TORCH_FLAGS += [f"-isystem{TORCH / 'include/torch/csrc/api/include'}"]
TORCH_LIBRARIES = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


# --- building ---------------------------------------------------------------------------------


def compiler() -> str | None:
    """The g++ to use; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build_ops(sanitized: bool = SANITIZED) -> Path:
    """The library that registers every op as torch.ops.skinfast_emulated on CPU tensors."""
    sources = [*sorted(CSRC.glob("*/*_cuda.cu")), CSRC / "library.cpp", CSRC / "core" / "isa.cpp"]
    return build_library("ops", sources, TORCH_FLAGS, TORCH_LIBRARIES, sanitized)


def build_library(
    name: str,
    sources: list[Path],
    flags: list[str] | None = None,
    libraries: list[str] | None = None,
    sanitized: bool = SANITIZED,
) -> Path:
    """A shared library of CUDA or C++ sources and the emulation; compiles only what changed."""
    folder = BUILD / ("sanitized" if sanitized else "plain") / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several pytest processes one builds
        return _build(folder, sources, flags or [], libraries or [], sanitized)


def _build(
    folder: Path, sources: list[Path], flags: list[str], libraries: list[str], sanitized: bool
) -> Path:
    flags = [*FLAGS, *flags, *(SANITIZE if sanitized else [])]
    if _gcc_version() >= 12:  # a local variable that was never written holds a visible pattern
        flags.append("-ftrivial-auto-var-init=pattern")
    headers = sorted(p for p in [*CSRC.rglob("*"), *HERE.glob("*")] if p.suffix in (".h", ".cuh"))

    def compile_one(source: Path) -> Path:
        result = folder / f"{source.stem}.o"
        command = [*flags, "-x", "c++", "-c", str(source), "-o", str(result)]
        _run_unless_done(result, command, [source, *headers])
        return result

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_one, [*sources, HERE / "emulation.cpp"]))
    library = folder / f"lib{folder.name}.so"
    mode = SANITIZE if sanitized else []
    command = ["-shared", *mode, *map(str, objects), *libraries, "-o", str(library)]
    _run_unless_done(library, command, objects)
    return library


def _run_unless_done(result: Path, arguments: list[str], inputs: list[Path]) -> None:
    digest = hashlib.sha256(repr((_gcc_version(), arguments)).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    stamp = result.with_suffix(f"{result.suffix}.sha256")
    if result.is_file() and stamp.is_file() and stamp.read_text() == digest.hexdigest():
        return
    stamp.unlink(missing_ok=True)
    done = subprocess.run([compiler() or "g++", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulation did not build:\n{done.stderr}")
    stamp.write_text(digest.hexdigest())


def _gcc_version() -> int:
    return int(_ask_gcc("-dumpversion").split(".")[0])


def _ask_gcc(question: str) -> str:
    done = subprocess.run([compiler() or "g++", question], capture_output=True, text=True)
    return done.stdout.strip()


def sanitized_environment() -> dict[str, str]:
    """The environment of a Python process that can load a sanitized library."""
    # libstdc++ as well: it must be there before AddressSanitizer looks for its __cxa_throw.
    libraries = [_ask_gcc(f"-print-file-name={name}") for name in ("libasan.so", "libstdc++.so.6")]
    changes = {
        "LD_PRELOAD": ":".join(str(Path(library).resolve()) for library in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SKINFAST_EMULATION_SANITIZED": "1",
    }
    return {**os.environ, **changes}


def run_pytest(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, which finds these modules."""
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


# --- running ----------------------------------------------------------------------------------


def declared_ops() -> list[str]:
    """The names of all low-level ops, from csrc/library.cpp."""
    return re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "library.cpp").read_text())


class Emulated(TorchDispatchMode):
    """While active, every call of a skinfast op on CPU tensors runs the emulated CUDA kernels.

    Each call is made in two orders of threads, whose results must be equal to the bit, and but for
    float16 on the CPU kernels, whose results must be close. Fresh memory is filled with NaN, so
    that an element that no thread writes shows. ``calls`` counts the calls by op.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "skinfast" or not _runs_on_cpu((args, kwargs)):
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        emulated = getattr(getattr(torch.ops.skinfast_emulated, name), func._overloadname)
        self.calls[name] = self.calls.get(name, 0) + 1
        seeds = range(ORDERS * self.calls[name], ORDERS * (self.calls[name] + 1))
        copies = tree_map_only(Tensor, _copy, [(args, kwargs) for _ in seeds])
        others = [_run(emulated, *copies[i], seed) for i, seed in enumerate(seeds[1:])]
        with _order(seeds[0]):
            result = emulated(*args, **kwargs)
        values = _tensors((result, args, kwargs))
        for other in others:
            for i, (value, same) in enumerate(zip(values, other, strict=True)):
                assert _bits_equal(value, same), f"{name}: value {i} depends on the thread order"
        if any(value.dtype == torch.float16 for value in values):
            return result  # which the CPU kernels refuse
        expected = _run(func, *copies[-1])
        for i, (value, wanted) in enumerate(zip(values, expected, strict=True)):
            _assert_close(f"{name}: value {i}", value, wanted)
        return result


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in tree_leaves(value) if isinstance(v, Tensor)]


def _runs_on_cpu(arguments: Any) -> bool:
    plain = (Tensor, torch.nn.Parameter)
    return all(type(t) in plain and t.device.type == "cpu" for t in _tensors(arguments))


def _run(func: Any, args: Any, kwargs: Any, seed: int = 0) -> list[Tensor]:
    """The results of a call, then its arguments as the call leaves them."""
    with _order(seed):
        result = func(*args, **kwargs)
    return _tensors((result, args, kwargs))


def _copy(tensor: Tensor) -> Tensor:
    """Equal values with the same strides, offset and gaps, in memory of its own."""
    storage = tensor.untyped_storage().clone()
    return tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


@contextmanager
def _order(seed: int) -> Iterator[None]:
    """Run with this order of threads, and with fresh memory filled with NaN."""
    os.environ["SKINFAST_EMULATION_SEED"] = str(seed)
    was = torch.are_deterministic_algorithms_enabled()
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(was)


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return same and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _strides(tensor: Tensor) -> list[int]:
    """Those that mean something: the dimension has more than one entry."""
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


def _assert_close(what: str, actual: Tensor, expected: Tensor) -> None:
    """Hold the two backends together, in units of the largest value.

    They may add in other orders. What their results must keep to is held against PyTorch.
    """
    assert _strides(actual) == _strides(expected), f"{what}: strides {actual.stride()}"
    unit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}
    tolerance = unit.get(expected.dtype, 0)
    finite = expected[expected.isfinite()].abs() if expected.is_floating_point() else expected[:0]
    scale = finite.max().item() if finite.numel() else 0.0
    torch.testing.assert_close(
        actual,
        expected,
        rtol=tolerance,
        atol=tolerance * scale,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )
