"""Freed memory is kept from step to step; large holes of the heap are given back."""

import mmap
import subprocess
import sys

import pytest

from skinfast.training.heap import HeapTrimmer

# In a process of its own, whose heap nothing else has shaped. Small blocks hold up the heap's end.
HOLES = """
import torch
from skinfast.training.heap import HeapTrimmer

trim = HeapTrimmer()
trim()
at_first = trim._resident()
blocks = [torch.ones(25_000) for _ in range(MEGABYTES * 10)]
kept = blocks[::50]
full = trim._resident()
del blocks
before = trim._resident()
for _ in range(32):
    trim()
print(full - at_first, before - at_first, trim._resident() - at_first)
"""

# Pages that the system had to bring when equal tensors were made ten times more.
FAULTS = """
import resource
import torch
from skinfast.training.heap import keep_freed_memory

keep_freed_memory()
for i in range(12):
    if i == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(4_000_000) for _ in range(12)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

needs_glibc = pytest.mark.skipif(not HeapTrimmer()._is_needed, reason="needs the GNU C library")


def printed_by(code: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@needs_glibc
def test_freed_memory_is_kept():
    """But for a hole or two that an older C library cannot use for an equal tensor again. Without
    it all twelve come anew in each round, unless a small block holds the heap's end."""
    pages_of_a_tensor = 4_000_000 * 4 // mmap.PAGESIZE
    assert printed_by(FAULTS)[0] < 5 * pages_of_a_tensor


@needs_glibc
@pytest.mark.parametrize(("megabytes", "given_back"), [(700, True), (200, False)])
def test_holes_are_given_back_once_they_are_large(megabytes, given_back):
    full, before, after = printed_by(HOLES.replace("MEGABYTES", str(megabytes)))
    assert full > 0.9e6 * megabytes
    assert before > 0.5 * full, "the blocks were no holes of the heap"
    assert (after < 0.2 * full) if given_back else (after > 0.9 * before)
