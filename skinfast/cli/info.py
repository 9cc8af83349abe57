"""``skinfast info``."""

from __future__ import annotations

import argparse
import json

from skinfast.cli.shared import Subparsers, add_command


def add(commands: Subparsers) -> None:
    add_command(
        commands, "info", _run, "print what is installed and what it runs on", "skinfast info"
    )


def _run(options: argparse.Namespace) -> int:
    from skinfast.environment import environment

    facts = environment()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            print(f"{name.replace('_', ' ') + ':':<22}{value}")
    return 0
