"""The settings of training as options of a command."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skinfast.training.config import TrainConfig


def add_settings(command: Any, leave_out: Collection[str] = ()) -> None:
    """Add an option for every setting of ``TrainConfig`` but ``leave_out``, and ``--preset``."""
    from skinfast.training.config import TrainConfig
    from skinfast.training.presets import PRESETS

    command.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="fill in the settings of the paper, or good ones, for the model; an option given "
        "beside it wins",
    )
    for setting in dataclasses.fields(TrainConfig):
        if setting.name not in leave_out:
            add_setting(command, setting.name)


def add_setting(command: Any, name: str, default: Any = None) -> None:
    """Add the option for a setting of ``TrainConfig``.

    Args:
        default: what the help says where the command's is not that of ``TrainConfig``.
    """
    from skinfast.training.config import TrainConfig, option

    (setting,) = (s for s in dataclasses.fields(TrainConfig) if s.name == name)
    choices, help = setting.metadata["choices"], setting.metadata["help"]
    # No defaults here: TrainConfig holds them, and --resume must know what was given.
    if setting.type == "bool":
        command.add_argument(
            option(name),
            # --no-... takes back what a preset has switched on.
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
            help=help,
        )
        return
    command.add_argument(
        option(name),
        type={"int": int, "float": float, "str": str}[str(setting.type)],
        choices=choices,
        default=argparse.SUPPRESS,
        metavar=None if choices else name.upper(),
        help=f"{help} (default: {setting.default if default is None else default})",
    )


def given_settings(options: argparse.Namespace, model: str | None = None) -> dict[str, Any]:
    """The settings that the user gave, on those of the preset that he chose.

    Args:
        model: whose preset it is where no --model was given; None means the default model.
    """
    from skinfast.training.config import TrainConfig
    from skinfast.training.presets import preset

    names = {setting.name for setting in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    if not options.preset:
        return given
    return {**preset(options.preset, given.get("model", model or TrainConfig.model)), **given}


def add_models(command: Any) -> None:
    """Add ``--model`` for one or several models; all three by default."""
    from skinfast.models import MODELS

    command.add_argument(
        "--model",
        dest="models",
        nargs="+",
        choices=tuple(MODELS),
        default=tuple(MODELS),
        help="which models (default: all three)",
    )


def configs_of(options: argparse.Namespace, fixed: Mapping[str, Any]) -> dict[str, TrainConfig]:
    """A configuration for each of ``--model``: the preset, then what was given, then ``fixed``.

    Args:
        fixed: what the command sets itself, whatever a preset says.
    """
    from skinfast.training.config import TrainConfig

    return {
        model: TrainConfig(**{**given_settings(options, model), **fixed, "model": model})
        for model in dict.fromkeys(options.models)
    }
