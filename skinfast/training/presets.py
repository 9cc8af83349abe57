"""Named sets of settings for each model: those of the paper, and good ones."""

from __future__ import annotations

from typing import Any

from skinfast.errors import SkinfastError

#: The paper's sections 3, 4.2 and 4.3 and its results: learning rate 0.001 (0.01 for ResNet-50),
#: decay rates 0.9 and 0.99, eps 1e-8, 200 epochs of the CNN and 20 of ResNet-50, a split by image.
#: It does not say the batch size, nor the epochs of the logistic regression; those are ours.
_PAPER: dict[str, Any] = {
    "batch_size": 64,
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "split": "image",
}

#: What image classifiers of this size are commonly trained with today. No images are held out to
#: choose an epoch by: the learning rate ends at 0 and the weights are averaged, so the last epoch
#: is as good as any, while balanced accuracy on 800 images, nine of one class, picks by chance.
_BEST: dict[str, Any] = {
    "batch_size": 64,
    "lr_schedule": "one-cycle",
    "augment": True,
    "rotate": True,
    "ema_decay": 0.998,
    "decoupled_weight_decay": True,
    "test_time_augmentation": True,
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "resnet50": {**_PAPER, "lr": 1e-2, "epochs": 20},
        "cnn": {**_PAPER, "epochs": 200},
        "logistic-regression": {**_PAPER, "epochs": 20},
    },
    "best": {
        "resnet50": {
            **_BEST,
            "epochs": 60,
            "lr": 1e-3,
            "weight_decay": 0.05,
            "color_jitter": 0.2,
            "label_smoothing": 0.1,
        },
        "cnn": {**_BEST, "epochs": 100, "lr": 4e-3, "weight_decay": 0.01, "color_jitter": 0.1},
        "logistic-regression": {**_BEST, "epochs": 40, "lr": 1e-3, "weight_decay": 0.1},
    },
}


def preset(name: str, model: str) -> dict[str, Any]:
    """The settings of ``TrainConfig`` that a preset fills in for a model; a copy.

    Raises:
        SkinfastError: there is no such preset or model.
    """
    if name not in PRESETS:
        raise SkinfastError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    if model not in PRESETS[name]:
        models = ", ".join(PRESETS[name])
        raise SkinfastError(f"there is no model {model!r}; choose one of {models}")
    return {"model": model, **PRESETS[name][model]}
