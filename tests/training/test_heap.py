"""The heap's holes are given back."""

import subprocess
import sys

import pytest

from skinfast.training.heap import HeapTrimmer

# In a process of its own, whose heap nothing else has shaped. Small blocks hold up the heap's end.
HOLES = """
import torch
from skinfast.training.heap import HeapTrimmer

trim = HeapTrimmer()
at_first = trim._resident()
blocks = [torch.ones(25_000) for _ in range(MEGABYTES * 10)]
kept = blocks[::50]
full = trim._resident()
del blocks
before = trim._resident()
trim()
print(full - at_first, before - at_first, trim._resident() - at_first)
"""


@pytest.mark.skipif(HeapTrimmer()._trim is None, reason="needs the GNU C library")
@pytest.mark.parametrize(("megabytes", "given_back"), [(700, True), (200, False)])
def test_holes_are_given_back_once_they_are_large(megabytes, given_back):
    code = HOLES.replace("MEGABYTES", str(megabytes))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    full, before, after = map(int, done.stdout.split())
    assert full > 0.9e6 * megabytes
    assert before > 0.5 * full, "the blocks were no holes of the heap"
    assert (after < 0.2 * full) if given_back else (after > 0.9 * before)
