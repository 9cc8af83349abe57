"""The paper's convolutional network (section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skinfast.errors import SkinfastError
from skinfast.nn import Conv2dReLUMaxPool2d, Linear, LinearReLU

_POOLS = (2, 3, 4)
MINIMUM_IMAGE_SIZE = 24


class CNN(nn.Module):
    """Three times convolution + ReLU + max-pool, then dense layers of 120, 64 and num_classes.

    Ten filters each of 3x3, 5x5 and 7x7 with 'same' padding, pools of 2, 3 and 4: maps of 64
    become 32, 10 and 2 (maps of 32: 16, 5 and 1), all before the dense layers.
    """

    def __init__(self, num_classes: int, image_size: int, backend: str) -> None:
        super().__init__()
        first, second, third = _POOLS
        self.conv1 = Conv2dReLUMaxPool2d(3, 10, 3, padding=1, pool_size=first, backend=backend)
        self.conv2 = Conv2dReLUMaxPool2d(10, 10, 5, padding=2, pool_size=second, backend=backend)
        self.conv3 = Conv2dReLUMaxPool2d(10, 10, 7, padding=3, pool_size=third, backend=backend)
        side = image_size
        for kernel in _POOLS:
            side //= kernel
        self.fc1 = LinearReLU(10 * side * side, 120, backend=backend)
        self.fc2 = LinearReLU(120, 64, backend=backend)
        self.fc3 = Linear(64, num_classes, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3(self.conv2(self.conv1(x)))
        return self.fc3(self.fc2(self.fc1(torch.flatten(x, 1))))


def cnn(num_classes: int = 7, image_size: int = 64, backend: str = "skinfast") -> CNN:
    """The paper's CNN: images ``[N, 3, image_size, image_size]`` to logits ``[N, num_classes]``.

    Initialised as torch.nn does (the paper does not say).

    Raises:
        SkinfastError: image_size is below 24, where the last pool would be left with nothing.
    """
    if image_size < MINIMUM_IMAGE_SIZE:
        raise SkinfastError(
            f"image_size is {image_size}; the CNN's three pools need at least {MINIMUM_IMAGE_SIZE}"
        )
    return CNN(num_classes, image_size, backend)
