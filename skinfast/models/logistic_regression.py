"""The paper's multi-class logistic regression with batch normalisation (section 4.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skinfast.errors import SkinfastError
from skinfast.nn import BatchNorm, op


class LogisticRegression(nn.Module):
    """Flatten, batch normalisation over the flattened pixels, one dense layer.

    The two layers hold the parameters; one op computes both, unless another normalisation was put
    in place (``convert_sync_batch_norm``). That op reads pixels as bytes just as well, a quarter of
    the memory, once the model was told what they stand for (``take_bytes``).
    """

    def __init__(self, num_classes: int, image_size: int, backend: str) -> None:
        super().__init__()
        features = 3 * image_size * image_size
        self.norm: nn.Module = BatchNorm(features, backend=backend)
        self.fc = nn.Linear(features, num_classes)
        self._function = op("batch_norm_linear", backend)
        self._backend = backend
        self._pixels: dict[str, Tensor] = {}

    @property
    def can_take_bytes(self) -> bool:
        """Whether its layers are computed by the op that reads bytes."""
        return self._backend == "skinfast" and isinstance(self.norm, BatchNorm)

    def take_bytes(self, scale: Tensor, shift: Tensor) -> None:
        """Let a uint8 pixel of channel c stand for ``scale[c] * pixel + shift[c]``.

        Args:
            scale, shift: float32 ``[3]`` on the model's device.
        """
        self._pixels = {"scale": scale, "shift": shift}

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(x, 1)
        pixels = self._pixels if x.dtype == torch.uint8 else {}
        if not isinstance(self.norm, BatchNorm):
            return self.fc(self.norm(x))
        return self._function(
            x,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            weight=self.fc.weight,
            bias=self.fc.bias,
            **self.norm.statistics(),
            **pixels,
        )


def logistic_regression(
    num_classes: int = 7, image_size: int = 64, backend: str = "skinfast"
) -> LogisticRegression:
    """Logistic regression: ``[N, 3, image_size, image_size]`` to logits ``[N, num_classes]``.

    Raises:
        SkinfastError: image_size is not positive.
    """
    if image_size < 1:
        raise SkinfastError(f"image_size is {image_size}; it needs to be at least 1")
    return LogisticRegression(num_classes, image_size, backend)
