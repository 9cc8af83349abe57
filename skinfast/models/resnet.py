"""ResNet-50 (He et al., https://arxiv.org/abs/1512.03385; the paper's section 4.2)."""

from __future__ import annotations

from torch import Tensor, nn

from skinfast.nn import (
    BatchNorm,
    BatchNormAddReLU,
    BatchNormReLUMaxPool2d,
    Conv2d,
    normalized_conv2d,
    normalized_conv2ds,
    op,
)

_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (the paper's figure 3 and equation 8).

    The stride is on the 3x3 convolution, as in torchvision ("v1.5"). Without its shortcut it is
    three plain layers (equation 13).
    """

    def __init__(
        self, channels: int, width: int, stride: int, backend: str, skip_connections: bool
    ) -> None:
        super().__init__()
        out = width * _EXPANSION
        self.conv1 = Conv2d(channels, width, 1, bias=False, backend=backend)
        self.bn1 = BatchNorm(width, relu=True, backend=backend)
        self.conv2 = Conv2d(width, width, 3, stride=stride, padding=1, bias=False, backend=backend)
        self.bn2 = BatchNorm(width, relu=True, backend=backend)
        self.conv3 = Conv2d(width, out, 1, bias=False, backend=backend)
        self.bn3: nn.Module = BatchNorm(out, relu=True, backend=backend)
        if skip_connections:
            self.bn3 = BatchNormAddReLU(out, backend=backend)
        self.skip_connections = skip_connections
        self.downsample: nn.Module | None = None
        if skip_connections and (stride != 1 or channels != out):
            self.downsample = nn.Sequential(
                Conv2d(channels, out, 1, stride=stride, bias=False, backend=backend),
                BatchNorm(out, backend=backend),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        residual = (shortcut,) if self.skip_connections else ()
        x = normalized_conv2d(self.conv1, self.bn1, x)
        return normalized_conv2ds(self.conv2, self.bn2, self.conv3, self.bn3, x, *residual)


class ResNet(nn.Module):
    """A stem, four stages of bottlenecks, global average pooling and a dense layer."""

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        num_classes: int,
        backend: str,
        skip_connections: bool = True,
    ) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, 64, 7, stride=2, padding=3, bias=False, backend=backend)
        self.bn1 = BatchNormReLUMaxPool2d(64, kernel_size=3, stride=2, padding=1, backend=backend)
        self.layer1 = _stage(64, 64, blocks[0], 1, backend, skip_connections)
        self.layer2 = _stage(256, 128, blocks[1], 2, backend, skip_connections)
        self.layer3 = _stage(512, 256, blocks[2], 2, backend, skip_connections)
        self.layer4 = _stage(1024, 512, blocks[3], 2, backend, skip_connections)
        self._average = op("global_average_pool2d", backend)
        self.fc = nn.Linear(2048, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self._average(x))


def _stage(
    channels: int, width: int, blocks: int, stride: int, backend: str, skip_connections: bool
) -> nn.Sequential:
    """Bottlenecks of one width; the first changes the number of channels and the resolution."""
    first = Bottleneck(channels, width, stride, backend, skip_connections)
    wide = width * _EXPANSION
    rest = [Bottleneck(wide, width, 1, backend, skip_connections) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet50(
    num_classes: int = 7,
    image_size: int = 64,
    backend: str = "skinfast",
    skip_connections: bool = True,
) -> ResNet:
    """ResNet-50: images ``[N, 3, H, W]`` of any size to logits ``[N, num_classes]``.

    The keys of its state_dict are torchvision's. Convolutions are initialised as in He et al.
    (2015), the rest as torch.nn does. ``image_size`` is taken for uniformity with the other models.
    Without ``skip_connections`` the same 50 layers stand one after the other (He et al.'s "plain"
    network): what the paper's section 4 compares with; its keys lack those of the shortcuts.
    """
    del image_size
    return ResNet((3, 4, 6, 3), num_classes, backend, skip_connections)
