"""ResNet-50 for inference: batch normalisation folded into the convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skinfast.errors import SkinfastError
from skinfast.models.resnet import ResNet
from skinfast.nn import Conv2d, Conv2dAddReLU, Conv2dReLU, MaxPool2d, op


class FoldedBottleneck(nn.Module):
    """A ``Bottleneck`` whose layers are convolutions with a bias and what follows them, fused."""

    def __init__(self, block: Any, backend: str) -> None:
        super().__init__()
        self.conv1 = _folded(Conv2dReLU, block.conv1, block.bn1, backend)
        self.conv2 = _folded(Conv2dReLU, block.conv2, block.bn2, backend)
        end = Conv2dAddReLU if block.skip_connections else Conv2dReLU
        self.conv3 = _folded(end, block.conv3, block.bn3, backend)
        self.skip_connections = block.skip_connections
        self.downsample: nn.Module | None = None
        if isinstance(block.downsample, nn.Sequential):
            conv, norm = block.downsample
            self.downsample = _folded(Conv2d, conv, norm, backend)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv2(self.conv1(x))
        return self.conv3(x, shortcut) if self.skip_connections else self.conv3(x)


class FoldedResNet(nn.Module):
    """What ``fold_batch_norm`` makes of a ResNet: images ``[N, 3, H, W]`` to logits."""

    def __init__(self, model: ResNet, backend: str) -> None:
        super().__init__()
        self.conv1 = _folded(Conv2dReLU, model.conv1, model.bn1, backend)
        self.maxpool = MaxPool2d(3, stride=2, padding=1, backend=backend)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(*(FoldedBottleneck(block, backend) for block in stage))
            for stage in (model.layer1, model.layer2, model.layer3, model.layer4)
        )
        self._average = op("global_average_pool2d", backend)
        self.fc = nn.Linear(model.fc.in_features, model.fc.out_features)
        self.fc.load_state_dict(model.fc.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self._average(x))


def fold_batch_norm(model: nn.Module, backend: str = "skinfast") -> FoldedResNet:
    r"""A copy of a trained ResNet in which no batch normalisation is left to compute.

    .. math:: w' = w \, \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad
              b' = \beta - \mu \, \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}

    for every output channel (Jacob et al. 2017, https://arxiv.org/abs/1712.05877, section 3.2),
    computed in float64 and stored in the dtype, layout and device of the model's weights. The copy
    is for inference: its statistics are fixed, its parameters ask for no gradient.

    Args:
        model: what ``skinfast.models.resnet50`` returns, in evaluation mode.
        backend: "skinfast", or "torch" for the same modules in pure PyTorch.

    Raises:
        SkinfastError: another model, one in training mode, or one without running statistics.
    """
    if not isinstance(model, ResNet):
        raise SkinfastError(
            f"fold_batch_norm needs a model of skinfast.models.resnet50; got {type(model).__name__}"
        )
    if model.training:
        raise SkinfastError(
            "the model is in training mode, where batch norm uses each batch's own statistics; "
            "call model.eval() first"
        )
    with torch.no_grad():
        folded = FoldedResNet(model, backend).to(model.fc.weight.device, model.fc.weight.dtype)
    return folded.eval().requires_grad_(False)


def _folded(kind: type[Conv2d], conv: Any, norm: Any, backend: str) -> Conv2d:
    """A convolution of that kind, with a bias, that does what ``conv`` and ``norm`` do."""
    mean, variance, weight, bias = (
        None if tensor is None else tensor.double()
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    if mean is None or variance is None:
        raise SkinfastError("a batch norm without running statistics cannot be folded")
    scale = torch.rsqrt(variance + norm.eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    folded = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        backend=backend,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    # The product keeps the layout of the weights, and the parameter takes it over.
    folded.weight = nn.Parameter((conv.weight * scale.view(-1, 1, 1, 1)).to(conv.weight.dtype))
    folded.bias = nn.Parameter(shift.to(conv.weight.dtype))
    return folded
