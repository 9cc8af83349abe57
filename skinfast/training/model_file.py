"""model.safetensors: the weights and, as its metadata, all that applying them needs."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from skinfast.errors import SkinfastError
from skinfast.files import atomic_path
from skinfast.models import build_model


@dataclass(frozen=True)
class ModelDescription:
    """How to build a model and how to feed it.

    Attributes:
        classes: the names of the outputs, in order.
        mean, std: of R, G and B, in units where 255 is 1.
    """

    model: str
    image_size: int
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def save_model(
    path: str | os.PathLike[str], model: nn.Module, description: ModelDescription
) -> None:
    """Write weights and description, whole or not at all.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    metadata = {"skinfast": json.dumps(dataclasses.asdict(description))}
    with atomic_path(path) as temporary:
        # save_file writes through a memory map, where a full disk is a crash instead of an error.
        temporary.write_bytes(save(tensors, metadata))


def load_model(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", backend: str = "skinfast"
) -> tuple[nn.Module, ModelDescription]:
    """The model of a file, in evaluation mode on ``device``, and its description.

    Raises:
        SkinfastError: the file is missing, cut off, or not one of skinfast's.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("skinfast")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise SkinfastError(
            f"{path} is missing; give the --output folder of a finished `skinfast train`"
        ) from None
    except (SafetensorError, OSError) as error:
        raise SkinfastError(f"{path} is cut off or broken ({error}); train again") from error
    if metadata is None:
        raise SkinfastError(f"{path} was not written by skinfast; it lacks the model's description")
    try:
        values = json.loads(metadata)
        description = ModelDescription(
            values["model"],
            values["image_size"],
            tuple(values["classes"]),
            tuple(values["mean"]),
            tuple(values["std"]),
        )
        model = build_model(
            description.model, len(description.classes), description.image_size, backend
        )
        model.load_state_dict(tensors)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SkinfastError(f"{path}: description and weights do not fit ({reason})") from error
    return model.to(device).eval(), description
