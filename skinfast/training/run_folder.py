"""The folder of a run while it is being written."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from skinfast.errors import SkinfastError
from skinfast.files import atomic_path, atomic_write_text, is_temporary
from skinfast.training.config import TrainConfig


class RunFolder:
    """``config.json``, ``metrics.jsonl`` and ``checkpoint/`` of one run.

    Every file is replaced whole, so that a run that dies at any moment can be resumed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.config_file = self.directory / "config.json"
        self.metrics_file = self.directory / "metrics.jsonl"
        self.checkpoint_file = self.directory / "checkpoint" / "state.pt"
        self.model_file = self.directory / "model.safetensors"
        # The first of them says that the run has finished, and goes first.
        names = ("result.json", "predictions.npz", "report.html")
        self.result_files = tuple(self.directory / name for name in names)

    def check_new(self) -> None:
        """Refuse a folder that a run cannot begin in.

        Raises:
            SkinfastError: the folder holds something already, or is a file.
        """
        if self.directory.is_file():
            raise SkinfastError(f"{self.directory} is a file; choose another --output")
        if self.directory.is_dir() and not all(map(is_temporary, self.directory.iterdir())):
            raise SkinfastError(
                f"{self.directory} exists; choose another --output, or continue it with --resume"
            )

    def create(self, config: TrainConfig) -> None:
        """Begin a run in a folder that ``check_new`` lets pass.

        Raises:
            SkinfastError: the folder holds something already, or is a file.
            OSError: it cannot be written.
        """
        self.check_new()
        # In this order: an interrupt leaves a folder that is new as before, or can be resumed.
        self.directory.mkdir(parents=True, exist_ok=True)
        config.save(self.config_file)
        self.checkpoint_file.parent.mkdir(exist_ok=True)

    def read_metrics(self, up_to_epoch: int) -> list[dict[str, Any]]:
        """The epochs that were finished, up to the one of the checkpoint.

        Raises:
            SkinfastError: the file is broken.
        """
        if up_to_epoch == 0:
            return []
        try:
            lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
            epochs = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise SkinfastError(
                f"{self.metrics_file} cannot be read ({error}); start again with another --output"
            ) from error
        return [epoch for epoch in epochs if epoch["epoch"] <= up_to_epoch]

    def write_metrics(self, epochs: list[dict[str, Any]]) -> None:
        """One line an epoch; a number that is not finite becomes null, which JSON can hold."""
        lines = [json.dumps({k: _finite(v) for k, v in epoch.items()}) for epoch in epochs]
        atomic_write_text(self.metrics_file, "\n".join(lines) + "\n")

    def remove_results(self) -> None:
        """Remove what was measured of a run that had finished, and now goes on to other weights.

        A run that is stopped on the way would have it beside metrics that it does not belong to.
        """
        for file in self.result_files:
            file.unlink(missing_ok=True)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write all that resuming needs.

        Raises:
            OSError: the disk is full; the checkpoint before this one stays.
        """
        with atomic_path(self.checkpoint_file) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:
                # torch's zip writer reports a full disk as RuntimeError.
                raise OSError(f"{self.checkpoint_file} could not be written ({error})") from error

    def load_checkpoint(self, config: TrainConfig, fingerprint: str) -> dict[str, Any] | None:
        """The state of the last finished epoch; None where none was finished.

        Raises:
            SkinfastError: it is cut off, of another model, of other data, or past
                ``config.epochs``; or it was removed when the run had finished.
        """
        mend = "start again with another --output"
        if not self.checkpoint_file.is_file():
            if self.model_file.is_file():
                raise SkinfastError(
                    f"{self.directory} holds a finished run without its checkpoint, which an "
                    f"experiment removes at the end; {mend}"
                )
            return None
        try:
            state = torch.load(self.checkpoint_file, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile):
            raise SkinfastError(f"{self.checkpoint_file} is cut off or broken; {mend}") from None
        if not isinstance(state, dict) or "model_name" not in state:
            raise SkinfastError(f"{self.checkpoint_file} is no checkpoint of skinfast; {mend}")
        if state["model_name"] != config.model:
            raise SkinfastError(
                f"{self.checkpoint_file} holds a {state['model_name']}, not a {config.model}; "
                f"{mend}"
            )
        if state["epoch"] > config.epochs:
            raise SkinfastError(
                f"the run has finished {state['epoch']} epochs already; give --epochs "
                f"{state['epoch']} or more, not {config.epochs}"
            )
        if state["data"] != fingerprint:
            raise SkinfastError(
                f"the images or labels of {config.data} have changed since the run began; {mend}"
            )
        return state


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
