"""``skinfast gradient-flow``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from skinfast.cli.settings import add_setting
from skinfast.cli.shared import Subparsers, add_command, check_output, note

# Of the settings of a run those that matter here; TrainConfig describes and checks them.
_SETTINGS = ("image_size", "epochs", "batch_size", "lr", "split", "seed", "device")
_EPOCHS = 5


def add(commands: Subparsers) -> None:
    command = add_command(
        commands,
        "gradient-flow",
        _run,
        "measure gradients by depth with and without skip connections (section 4 of the paper)",
        "skinfast gradient-flow --data data/ham10000 --image-size 32 --output gradient-flow",
    )
    command.add_argument(
        "--data", required=True, help="folder (or MedMNIST .npz) of HAM10000, or 'synthetic'"
    )
    command.add_argument("--output", required=True, metavar="DIR", help="the folder to write into")
    command.add_argument(
        "--model",
        dest="networks",
        nargs="+",
        choices=("resnet50", "resnet50-without-skips", "cnn"),
        help="which networks (default: all three)",
    )
    for name in _SETTINGS:
        add_setting(command, name, _EPOCHS if name == "epochs" else None)
    command.add_argument(
        "--probe-images", type=int, default=64, help="images that are measured (default: 64)"
    )
    command.add_argument(
        "--train-images", type=int, help="train on so many images only (default: all)"
    )


def _run(options: argparse.Namespace) -> int:
    from skinfast.evaluation.gradient_flow import NETWORKS, gradient_flow
    from skinfast.report.gradient_flow import summary, write_gradient_flow
    from skinfast.training import TrainConfig

    check_output(options.output)
    given = {name: value for name, value in vars(options).items() if name in _SETTINGS}
    networks = [name for name in NETWORKS if not options.networks or name in options.networks]
    given = {"epochs": _EPOCHS, **given, "data": options.data}
    # Each has demands of its own on the settings, which it should not make after hours.
    *_, config = [TrainConfig(**{**given, "model": NETWORKS[name]}) for name in networks]
    result = gradient_flow(
        config,
        tuple(networks),
        probe_images=options.probe_images,
        train_images=options.train_images,
        on_epoch=_note_epoch,
    )
    page = write_gradient_flow(result, options.output)
    for network in result["networks"]:
        if network["diverged_in_epoch"] is not None:
            note(
                f"the loss of {network['name']} is not finite after epoch "
                f"{network['diverged_in_epoch']}; lower --lr (it is {config.lr})"
            )
    if options.json:
        print((Path(options.output) / "gradient_flow.json").read_text(encoding="utf-8"), end="")
        return 0
    print(
        f"{'network':<24}{'epoch':>5}{'loss':>8}{'first layer':>13}{'last layer':>12}"
        f"{'ratio':>10}{'dead units':>12}{'median step':>13}"
    )
    for network in result["networks"]:
        for line in summary(network):
            ratio = "-" if line["ratio"] is None else f"{line['ratio']:.3g}"
            print(
                f"{network['name']:<24}{line['epoch']:>5}{line['loss']:8.3f}{line['first']:13.2e}"
                f"{line['last']:12.2e}{ratio:>10}{line['dead_units']:12.1%}"
                f"{line['update_ratio']:13.1e}"
            )
    print(f"report: {page}")
    return 0


def _note_epoch(network: str, measured: dict[str, Any]) -> None:
    note(f"{network} epoch {measured['epoch']}: loss {measured['loss']:.4f}")
