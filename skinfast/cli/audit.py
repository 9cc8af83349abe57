"""``skinfast audit``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from skinfast.cli.shared import Subparsers, add_command, check_output, check_seed


def add(commands: Subparsers) -> None:
    from skinfast.data.splits import SPLIT_KINDS

    command = add_command(
        commands,
        "audit",
        _run,
        "look for leaks, copies, label conflicts and broken files in a data folder",
        "skinfast audit --data data/ham10000 --output audit",
    )
    command.add_argument(
        "--data", required=True, help="folder (or MedMNIST .npz) of HAM10000, or 'synthetic'"
    )
    command.add_argument(
        "--split",
        choices=SPLIT_KINDS,
        default="image",
        help="the split that training would use (default: image)",
    )
    command.add_argument("--seed", type=int, default=0, help="of that split (default: 0)")
    command.add_argument(
        "--output", metavar="DIR", help="write audit.json and audit.html, with pictures, there"
    )


def _run(options: argparse.Namespace) -> int:
    from skinfast.audit import audit, write_audit

    check_output(options.output)
    check_seed(options.seed)
    found = audit(options.data, options.split, options.seed)
    page = write_audit(found, options.output) if options.output else None
    if options.json:
        print(json.dumps(found.findings, indent=2))
        return 0
    for line in _lines(found.findings):
        print(line)
    if page:
        print(f"report: {page}")
    return 0


def _lines(findings: dict[str, Any]) -> list[str]:
    summary, lesions = findings["summary"], findings["lesions"]
    shared = "unknown"
    if lesions is not None:
        shared = (
            f"{lesions['test_images_of_training_lesions']} ({lesions['share_of_test']:.1%} of "
            f"{findings['num_test']})"
        )
    rows = [
        ("images that can be read", str(findings["num_images"])),
        ("unreadable images", _number(summary["unreadable_images"])),
        (f"test images of training lesions, split by {findings['split']}", shared),
        ("identical pairs, of which across the split", _of(summary, "identical_pairs")),
        ("nearly identical pairs, of which across", _of(summary, "near_identical_pairs")),
        ("pairs of different lesions", _number(summary["pairs_of_different_lesions"])),
        ("lesions with conflicting labels", _number(summary["lesions_with_conflicting_labels"])),
        ("pairs with conflicting labels", _number(summary["pairs_with_conflicting_labels"])),
    ]
    lines = [f"{name:<50}{value}" for name, value in rows]
    if findings["metadata"]:
        lines.append(f"{'metadata alone':<50}balanced accuracy")
    for leak in findings["metadata"]:
        after = ", known only after the diagnosis" if leak["after_diagnosis"] else ""
        above = "above" if leak["above_chance"] else "not above"
        lines.append(
            f"  {', '.join(leak['columns']):<48}{leak['balanced_accuracy']:.3f} ± "
            f"{leak['standard_deviation']:.3f}, {above} chance {leak['chance']:.3f}{after}"
        )
    lines += [f"unreadable: {image_id} ({reason})" for image_id, reason in findings["unreadable"]]
    return lines


def _of(summary: dict[str, Any], key: str) -> str:
    return f"{summary[key]}, {summary[f'{key}_across_split']}"


def _number(value: int | None) -> str:
    return "unknown" if value is None else str(value)
