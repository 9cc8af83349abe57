"""One file for each command that is more than a few lines; ``cli.py`` lists them."""

from __future__ import annotations

from typing import Any


def add_command(commands: Any, name: str, run: Any, help: str, example: str) -> Any:
    """A command with ``--json`` and an example, as all of them are."""
    from skinfast.cli import _add  # cli.py imports the commands

    return _add(commands, name, run, help, example)
