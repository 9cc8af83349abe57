"""``skinfast selfcheck``."""

from __future__ import annotations

import argparse
import dataclasses
import json

import skinfast
from skinfast.cli.shared import Subparsers, add_command


def add(commands: Subparsers) -> None:
    command = add_command(
        commands,
        "selfcheck",
        _run,
        "hold every op and model of this installation against pure PyTorch",
        "skinfast selfcheck --output selfcheck.json",
    )
    command.add_argument("--output", metavar="FILE", help="write the results as JSON as well")


def _run(options: argparse.Namespace) -> int:
    from skinfast.environment import environment
    from skinfast.files import atomic_write_text

    checks = skinfast.selfcheck()
    failed = [check for check in checks if not check.passed]
    text = json.dumps(
        {
            "passed": not failed,
            "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in checks],
            "environment": environment(),
        },
        indent=2,
    )
    if options.output:
        atomic_write_text(options.output, text + "\n")
    if options.json:
        print(text)
    else:
        print(f"{'subject':<26}{'device':<8}{'dtype':<10}{'calls':>6}  result")
        for check in checks:
            result = "equal" if check.passed else f"DIFFERS: {check.failure}"
            print(
                f"{check.subject:<26}{check.device:<8}{check.dtype:<10}{check.calls:>6}  {result}"
            )
        print(f"{len(checks) - len(failed)} of {len(checks)} checks passed")
    return 1 if failed else 0
