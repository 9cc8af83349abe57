"""What the C library does with memory that nothing uses: kept for the next step, not for ever."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_GROWTH = 2**29
_CALLS_BETWEEN_LOOKS = 32
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT = 2**31 - 1  # bytes; the most that it takes
_LARGEST_ON_HEAP = 2**25  # bytes; the most that it takes


def keep_freed_memory() -> None:
    """Have the GNU C library keep what is freed, up to 2 GB, in this process from now on.

    By default what a training step frees at the end of the heap goes back to the system, and comes
    again at the next step page by page, each of them zeroed: of ResNet-50's steps a twentieth.
    Blocks of more than 32 MB still come and go. Overrides what the environment says of both
    (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``); another C library stays as it is.
    :func:`give_back_freed_memory` returns what is kept.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP)


def give_back_freed_memory() -> None:
    """Have the GNU C library return all free pages now."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


class HeapTrimmer:
    """Called at every step, it returns the heap's free pages once half a gigabyte has been added.

    Added to what a step takes: the least memory of the process at any look since the first one, or
    since the first one after pages were returned.

    PyTorch takes a tensor's memory from ``posix_memalign``. Before version 2.38 the GNU C library
    often cannot use what was freed for an equal request again (its bug 14581): a hole between
    small objects lacks the bytes that the alignment may need. Hours of equal steps then end with
    tens of gigabytes of holes. Elsewhere a call does nothing.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._is_needed = _function("malloc_trim") is not None
        self._in_use: int | None = None  # bytes, the pages that steps use again and again included

    def __call__(self) -> None:
        self._calls += 1
        # To ask the system takes as long as an op on small tensors.
        if not self._is_needed or self._calls % _CALLS_BETWEEN_LOOKS != 1:
            return
        resident = self._resident()
        self._in_use = resident if self._in_use is None else min(self._in_use, resident)
        if resident > self._in_use + _GROWTH:
            give_back_freed_memory()
            self._in_use = None

    def _resident(self) -> int:
        """Bytes of physical memory that this process holds."""
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def _function(name: str) -> ctypes._NamedFuncPointer | None:
    """A function of the GNU C library; None with another library."""
    if sys.platform != "linux" or not Path("/proc/self/statm").exists():
        return None
    return getattr(ctypes.CDLL(None), name, None)
