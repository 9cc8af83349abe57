"""One file for each command that is more than a few lines; ``cli.py`` lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skinfast.errors import SkinfastError


def add_command(commands: Any, name: str, run: Any, help: str, example: str) -> Any:
    """A command with ``--json`` and an example, as all of them are."""
    from skinfast.cli import _add  # cli.py imports the commands

    return _add(commands, name, run, help, example)


def check_output(directory: str | None) -> None:
    """Refuse an ``--output`` that cannot be a folder, before hours are spent.

    Raises:
        SkinfastError: it is a file.
    """
    if directory is not None and Path(directory).is_file():
        raise SkinfastError(f"{directory} is a file; choose another --output")


def check_seed(seed: int) -> None:
    """Refuse a ``--seed`` that no generator takes.

    Raises:
        SkinfastError: it is out of range.
    """
    if not 0 <= seed < 2**32:
        raise SkinfastError(f"--seed is {seed}; it needs to be from 0 to 2**32 - 1")
