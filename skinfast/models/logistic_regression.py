"""The paper's multi-class logistic regression with batch normalisation (section 4.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skinfast.errors import SkinfastError
from skinfast.nn import BatchNorm, op


class LogisticRegression(nn.Module):
    """Flatten, batch normalisation over the flattened pixels, one dense layer.

    The two layers hold the parameters; one op computes both, unless another normalisation was put
    in place (``convert_sync_batch_norm``).
    """

    def __init__(self, num_classes: int, image_size: int, backend: str) -> None:
        super().__init__()
        features = 3 * image_size * image_size
        self.norm: nn.Module = BatchNorm(features, backend=backend)
        self.fc = nn.Linear(features, num_classes)
        self._function = op("batch_norm_linear", backend)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(x, 1)
        if not isinstance(self.norm, BatchNorm):
            return self.fc(self.norm(x))
        return self._function(
            x,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            weight=self.fc.weight,
            bias=self.fc.bias,
            **self.norm.statistics(),
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
