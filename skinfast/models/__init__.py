"""The paper's three classifiers. Each maps ``[N, 3, H, W]`` to logits ``[N, num_classes]``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from skinfast.errors import SkinfastError
from skinfast.models.cnn import cnn
from skinfast.models.folding import fold_batch_norm
from skinfast.models.logistic_regression import logistic_regression
from skinfast.models.resnet import resnet50

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet50": resnet50,
    "cnn": cnn,
    "logistic-regression": logistic_regression,
}

#: Fastest with images and weights stored channels_last; the small models choose for themselves.
CHANNELS_LAST_MODELS = ("resnet50",)

__all__ = [
    "CHANNELS_LAST_MODELS",
    "MODELS",
    "build_model",
    "cnn",
    "fold_batch_norm",
    "logistic_regression",
    "resnet50",
]


def build_model(
    name: str, num_classes: int = 7, image_size: int = 64, backend: str = "skinfast"
) -> nn.Module:
    """The model of that name, freshly initialised from torch's global generator.

    Its weights are stored in the layout that it is fastest in.

    Raises:
        SkinfastError: there is no such model, or it can't take images of that size.
    """
    if name not in MODELS:
        raise SkinfastError(f"there is no model {name!r}; choose one of {', '.join(MODELS)}")
    model = MODELS[name](num_classes=num_classes, image_size=image_size, backend=backend)
    if name in CHANNELS_LAST_MODELS:
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model
