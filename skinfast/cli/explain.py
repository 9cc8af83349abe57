"""``skinfast explain``."""

from __future__ import annotations

import argparse
from pathlib import Path

from skinfast.cli.shared import Subparsers, add_command, check_output


def add(commands: Subparsers) -> None:
    command = add_command(
        commands,
        "explain",
        _run,
        "show which parts of images speak for a class (Grad-CAM; not a diagnostic device)",
        "skinfast explain runs/cnn lesion.jpg --output explained",
    )
    command.add_argument("directory", metavar="RUN", help="the folder of a run of resnet50 or cnn")
    command.add_argument("images", metavar="IMAGE", nargs="+", help="JPEG or PNG files")
    command.add_argument("--output", required=True, metavar="DIR", help="the folder to write into")
    command.add_argument(
        "--class", dest="class_name", metavar="CLASS", help="explain it, not the predicted one"
    )
    command.add_argument(
        "--layer", help="a stage of the model (default: the deepest with maps of 4x4 or more)"
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def _run(options: argparse.Namespace) -> int:
    from skinfast.evaluation.explain import explain
    from skinfast.report.explain import place, write_explanations

    check_output(options.output)
    explanations = explain(
        options.directory,
        options.images,
        class_name=options.class_name,
        layer=options.layer,
        device=options.device,
    )
    page = write_explanations(explanations, options.output)
    if options.json:
        print((Path(options.output) / "explain.json").read_text(encoding="utf-8"), end="")
        return 0
    for one in explanations:
        print(
            f"{one.image}: {one.class_name}, probability {one.probability:.3f}; most speaks for it "
            f"{place(one.heat)} ({one.layer}, {one.heat.shape[0]}x{one.heat.shape[1]})"
        )
    print(f"report: {page}")
    return 0
