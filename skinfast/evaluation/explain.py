"""Grad-CAM: which parts of a picture speak for a class, by a model's last feature maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from skinfast.errors import SkinfastError
from skinfast.evaluation.run import load_pictures, settings_of
from skinfast.evaluation.temperature import read_temperature
from skinfast.training.model_file import load_model
from skinfast.training.problem import choose_device
from skinfast.training.run_folder import RunFolder
from skinfast.training.step import autocast

#: Smallest side of feature maps that can say where something is: ResNet-50's last are 2x2 at
#: 64x64 and a single value at 32x32.
MINIMUM_SIDE = 4


@dataclass(frozen=True)
class Explanation:
    """One picture and what speaks for a class in it.

    Attributes:
        pixels: uint8 ``[H, W, 3]``, as the model sees the picture.
        heat: float32 ``[h, w]``, 0 to 1: the Grad-CAM of ``class_name``, 1 being its maximum; all 0
            where nothing speaks for the class.
        class_name: the class explained.
        probability: the model's for it, of the one view that is explained; calibrated where the
            run's temperature was fitted to single views.
        predicted: the class of highest probability.
        layer: the module whose feature maps were looked at.
    """

    image: str
    pixels: npt.NDArray[np.uint8]
    heat: npt.NDArray[np.float32]
    class_name: str
    probability: float
    predicted: str
    layer: str


def explain(
    directory: str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str]],
    *,
    class_name: str | None = None,
    layer: str | None = None,
    device: str = "auto",
) -> list[Explanation]:
    """Explain a run's answers to image files by Grad-CAM.

    Args:
        directory: the folder of a finished run of a convolutional model.
        images: JPEG or PNG files.
        class_name: the class to explain; None means each image's predicted one.
        layer: a child module of the model, such as "layer4"; None means the deepest whose maps have
            a side of 4 or more.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        SkinfastError: the run folder or an image cannot be used; a model without feature maps; no
            such class or layer.

    Source: Selvaraju et al., "Grad-CAM", https://arxiv.org/abs/1610.02391, equations 1 and 2.
    """
    chosen = choose_device(device)
    run = RunFolder(directory)
    settings = settings_of(run)
    model, description = load_model(run.model_file, chosen, settings.backend)
    if class_name is not None and class_name not in description.classes:
        raise SkinfastError(
            f"there is no class {class_name!r}; choose one of {', '.join(description.classes)}"
        )
    temperature = read_temperature(directory, test_time_augmentation=False) or 1.0
    pixels, batches = load_pictures(images, description, chosen, at_once=1)
    explained = []
    for image, picture, (batch, _) in zip(images, pixels, batches, strict=True):
        asked = None if class_name is None else description.classes.index(class_name)
        with autocast(chosen, settings.precision):
            heat, label, logits, used = grad_cam(model, batch, asked, layer)
        probabilities = torch.softmax(logits / temperature, 0).tolist()
        explained.append(
            Explanation(
                os.fspath(image),
                picture,
                heat,
                description.classes[label],
                probabilities[label],
                description.classes[int(logits.argmax())],
                used,
            )
        )
    return explained


def grad_cam(
    model: nn.Module, image: Tensor, label: int | None = None, layer: str | None = None
) -> tuple[npt.NDArray[np.float32], int, Tensor, str]:
    """``relu(sum_k a_k A_k)`` with ``a_k`` the mean of ``d logit / d A_k`` over map ``A_k``.

    Args:
        model: images ``[1, 3, H, W]`` to logits ``[1, C]``, in evaluation mode.
        image: float ``[1, 3, H, W]``, normalised.
        label: the class; None means the predicted one.
        layer: see ``explain``.

    Returns:
        The heat, float32 ``[h, w]``, divided by its maximum unless that is 0; the class; the
        logits, float64 ``[C]``; and the name of the layer.

    Raises:
        SkinfastError: no such layer, or none with feature maps.
    """
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                maps[name] = output

        return hook

    # Children are the stages that the image passes; what is inside of a residual block has a way
    # around it, and the heat of one of its branches would tell half.
    handles = [child.register_forward_hook(keep(n)) for n, child in model.named_children()]
    try:
        with torch.enable_grad():
            logits = model(image)[0]
    finally:
        for handle in handles:
            handle.remove()
    name = _choose_layer(maps, layer)
    chosen = int(logits.argmax()) if label is None else label
    (gradient,) = torch.autograd.grad(logits[chosen], maps[name])
    weights = gradient.double().mean((2, 3), keepdim=True)
    heat = torch.relu((weights * maps[name].detach().double()).sum(1)[0])
    if float(heat.max()) > 0:
        heat = heat / heat.max()
    return heat.float().cpu().numpy(), chosen, logits.detach().double().cpu(), name


def _choose_layer(maps: dict[str, Tensor], layer: str | None) -> str:
    if not maps:
        raise SkinfastError(
            "this model has no feature maps to look at; give a run of resnet50 or cnn"
        )
    if layer is not None:
        if layer not in maps:
            raise SkinfastError(f"there is no layer {layer!r}; choose one of {', '.join(maps)}")
        return layer
    large = [name for name, x in maps.items() if min(x.shape[2:]) >= MINIMUM_SIDE]
    if not large:
        raise SkinfastError(
            f"no feature maps are {MINIMUM_SIDE}x{MINIMUM_SIDE} or larger; "
            f"choose a --layer of {', '.join(maps)}, or train on larger images"
        )
    return large[-1]
