"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

#: What np.load raises depends on the byte at which the file was cut, or what it is instead.
BROKEN_NPZ = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it over ``path`` when the block succeeds.

    If the block raises (a full disk, an interrupt), the temporary file is removed and what stood at
    ``path`` before is untouched. A symbolic link is followed.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        yield path  # a pipe or a device is written to, not replaced
        return
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        # mkstemp creates 0600 files; results are meant to be shared as any other file is.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_temporary(path: str | os.PathLike[str]) -> bool:
    """Whether the name is one of ``atomic_path``'s, which a killed process leaves behind."""
    return re.fullmatch(r"\..+\.[a-z0-9_]{8}\.tmp", Path(path).name) is not None


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` (UTF-8) so that a reader sees the old file or the new, whole."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
