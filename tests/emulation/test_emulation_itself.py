"""The emulation computes what CUDA defines, and finds mistakes that were planted."""

import ctypes
import os
import subprocess
import sys

import emulated
import pytest
import torch

PLANTED = emulated.HERE / "planted.cu"
SEEDS = range(6)


def line_of(text):
    """The line of planted.cu that holds this text."""
    lines = PLANTED.read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if text in line]
    return f"planted.cu:{number}"


class Planted:
    """Calls planted.cu; tensors go as pointers, and what a launch throws becomes an error."""

    def __init__(self):
        self.library = ctypes.CDLL(str(emulated.build_library("planted", [PLANTED])))

    def __call__(self, name, *args, seed=0):
        os.environ["SKINFAST_EMULATION_SEED"] = str(seed)
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
        if (message := function(*values)) is not None:
            raise RuntimeError(message.decode())


@pytest.fixture(scope="module")
def call():
    return Planted()


def ints(*shape):
    return torch.full(shape, -1, dtype=torch.int32)


# --- what CUDA defines ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles_and_votes(call, seed):
    out = ints(9, 32)
    call("shuffles", out, seed=seed)
    lanes = range(32)
    assert out.tolist() == [
        [5 for _ in lanes],
        [i - 3 if i >= 3 else i for i in lanes],
        [i + 3 if i < 29 else i for i in lanes],
        [i ^ 16 for i in lanes],
        [i + 1 if i % 8 < 7 else i for i in lanes],
        [i // 8 * 8 + 1 for i in lanes],
        [2 * (i ^ 1) + 1 for i in lanes],
        [sum(1 << i for i in lanes if i % 3 == 0) for _ in lanes],
        [2 for _ in lanes],
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_of_a_warp_meet_among_themselves(call, seed):
    out = ints(32)
    call("divided_warp", out, seed=seed)
    assert out.tolist() == [i ^ 15 if i < 16 else i ^ 1 for i in range(32)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_does_not_wait_for_threads_that_exited(call, seed):
    out = torch.arange(45, dtype=torch.int32)
    call("early_exit", out, 45, seed=seed)
    assert out.tolist() == list(reversed(range(45)))


def test_indices_in_three_dimensions(call):
    out = ints(2, 3, 2, 3, 4, 5)
    call("indices", out)
    for index in ((0, 0, 0, 0, 0, 0), (1, 2, 1, 2, 3, 4), (1, 0, 1, 0, 2, 1)):
        digits = int("".join(map(str, index)))
        assert out[index] == digits
    assert out.unique().numel() == out.numel()


@pytest.mark.parametrize("name", ["block_sum", "tree"])
def test_a_right_reduction_does_not_depend_on_the_order(call, name):
    for seed in SEEDS:
        x, out, sizes = reduction(name)
        call(name, x, out, *sizes, True, seed=seed)
        assert torch.equal(out, x.sum(1))


def reduction(name):
    """Integers, so that the sum is exact: x, out, further arguments."""
    if name == "tree":
        return torch.arange(256.0).view(1, 256), torch.zeros(1), ()
    return torch.arange(640.0).view(5, 128), torch.zeros(5), (5,)


# --- planted mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["block_sum", "tree"])
def test_a_missing_barrier_shows_as_results_that_differ(call, name):
    results = []
    for seed in SEEDS:
        x, out, sizes = reduction(name)
        call(name, x, out, *sizes, False, seed=seed)
        results.append(out)
    assert any(not torch.equal(results[0], other) for other in results[1:])
    assert not any(torch.equal(result, x.sum(1)) for result in results[:2])


def test_shared_memory_that_nobody_wrote_shows(call):
    first, second = torch.zeros(2, 32), torch.zeros(2, 32)
    call("unwritten_shared", first, seed=0)
    call("unwritten_shared", second, seed=1)
    written = torch.arange(32) != 7
    assert first[:, 7].isnan().all()
    assert (second[:, 7] > 1e30).all()
    assert (first[:, written] == 1).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "divergent_barrier",
            r"thread .* waits in __syncthreads at .*, but thread .*__syncthreads",
        ),
        ("shuffle_from_exited", r"reads lane 4, which does not exist, has exited"),
        ("shuffle_beyond_block", r"reads lane 3, which does not exist"),
        ("shuffle_without_self", r"__shfl_sync at .*planted.cu:\d+ with a mask that leaves it out"),
        ("lane_that_never_comes", r"waits in __shfl_sync .*, but thread .* in __syncthreads"),
    ],
)
def test_threads_that_cannot_meet_are_an_error(call, name, message):
    out = ints(64)
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=f"^emulation: .*({message})"):
            call(name, *([] if name == "divergent_barrier" else [out]), seed=seed)
    call("divided_warp", out)  # the next launch is sound


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("nothing", (0, 32, 0), r"a grid of \(0, 1, 1\) blocks"),
        ("nothing", (1, 0, 0), r"a block of \(0, 1, 1\) threads"),
        ("nothing", (1, 1056, 0), r"a block of \(1056, 1, 1\) threads; it needs 1 to 1024"),
        ("nothing", (1, 32, 49153), "49153 bytes of dynamic shared memory; .* 49152"),
        ("much_shared", (200_000,), "200000 bytes of shared memory are more than"),
    ],
)
def test_a_launch_beyond_the_limits_is_an_error(call, name, args, message):
    with pytest.raises(RuntimeError, match=message):
        call(name, *args)


def test_cudaFuncSetAttribute_allows_more_shared_memory(call):  # noqa: N802
    call("much_shared", 100_000)


def test_an_atomic_does_not_compile():
    with pytest.raises(RuntimeError, match='attempt to use poisoned "atomicAdd"'):
        emulated.build_library("planted_atomic", [PLANTED], ["-DPLANTED_ATOMIC"])


@pytest.mark.parametrize(
    ("call", "error", "place"),
    [
        ("'off_by_one', x, out, 100", "heap-buffer-overflow", "<= for <"),
        ("'shared_overflow', out, True", "global-buffer-overflow", "shared[threadIdx.x + 1]"),
        ("'shared_overflow', out, False", "heap-buffer-overflow", "shared[threadIdx.x + 1]"),
        ("'misaligned', x, out", "misaligned address", "(x + 1)"),
    ],
)
def test_a_sanitizer_names_the_line(call, error, place):
    """On tensors of torch, in the process and on the build that the sanitized run uses."""
    script = "import torch, test_emulation_itself as t; "
    script += f"x, out = torch.zeros(100), torch.zeros(100); t.Planted()({call})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=emulated.HERE,
        env=emulated.sanitized_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert error in done.stderr
    assert line_of(place) in done.stderr
