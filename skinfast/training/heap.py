"""Gives back memory that the C library keeps though nothing uses it."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_GROWTH = 2**29
_CALLS_BETWEEN_LOOKS = 32


class HeapTrimmer:
    """Called at every step, it returns the heap's free pages once half a gigabyte has been added.

    PyTorch takes a tensor's memory from ``posix_memalign``. Before version 2.38 the GNU C library
    often cannot use what was freed for an equal request again (its bug 14581): a hole between
    small objects lacks the bytes that the alignment may need. Hours of equal steps then end with
    tens of gigabytes of holes. Elsewhere a call does nothing.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._trim = _malloc_trim()
        self._least = self._resident()

    def __call__(self) -> None:
        self._calls += 1
        # To ask the system takes as long as an op on small tensors.
        if self._trim is None or self._calls % _CALLS_BETWEEN_LOOKS != 1:
            return
        resident = self._resident()
        if resident > self._least + _GROWTH:
            self._trim(0)
            resident = self._resident()
            # What stays is in use; only further growth is worth a look at the whole heap.
            self._least = resident
        self._least = min(self._least, resident)

    def _resident(self) -> int:
        """Bytes of physical memory that this process holds."""
        if self._trim is None:
            return 0
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    """The GNU C library's function; None with another library."""
    if sys.platform != "linux" or not Path("/proc/self/statm").exists():
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
