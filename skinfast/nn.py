"""Modules on the fused ops, with the parameters, names and initialisation of their torch.nn twins.

Every module takes ``backend``: "skinfast" runs the fused op, "torch" runs its reference in pure
PyTorch. The two have equal state_dicts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from skinfast.errors import SkinfastError

BACKENDS = ("skinfast", "torch")


def op(name: str, backend: str) -> Callable[..., Any]:
    """The function that computes an op: ours, or its pure PyTorch reference.

    Raises:
        SkinfastError: ``backend`` is neither "skinfast" nor "torch".
    """
    if backend not in BACKENDS:
        raise SkinfastError(f"backend is {backend!r}; it needs to be one of {', '.join(BACKENDS)}")
    module = importlib.import_module(f"skinfast.ops.{name}")
    return getattr(module, name if backend == "skinfast" else "reference")


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` on ``skinfast.ops.conv2d``: ``[N, C, H, W]`` to ``[N, K, P, Q]``."""

    _op = "conv2d"

    def __init__(self, *args: Any, backend: str = "skinfast", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise SkinfastError(f"padding_mode is {self.padding_mode!r}; it needs to be 'zeros'")
        self._function = op(self._op, backend)

    def forward(self, input: Tensor) -> Tensor:
        return self._function(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Conv2dReLU(Conv2d):
    """``torch.nn.Conv2d`` and ReLU: ``[N, C, H, W]`` to ``[N, K, P, Q]``."""

    _op = "conv2d_relu"


class Conv2dAddReLU(Conv2d):
    """``relu(torch.nn.Conv2d(input) + residual)``: the end of a residual block, folded."""

    _op = "conv2d_add_relu"

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return self._function(
            input,
            self.weight,
            self.bias,
            residual,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class Conv2dReLUMaxPool2d(Conv2d):
    """``torch.nn.Conv2d``, ReLU and ``torch.nn.MaxPool2d(pool_size)``, as a layer of the CNN.

    ``[N, C, H, W]`` to ``[N, K, P // pool_size, Q // pool_size]``.
    """

    _op = "conv2d_relu_max_pool2d"

    def __init__(self, *args: Any, pool_size: int | tuple[int, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (self.stride, self.dilation, self.groups) != ((1, 1), (1, 1), 1):
            raise SkinfastError("Conv2dReLUMaxPool2d needs stride=1, dilation=1 and groups=1")
        self.pool_size = pool_size

    def forward(self, input: Tensor) -> Tensor:
        return self._function(input, self.weight, self.bias, self.padding, self.pool_size)


class LinearReLU(nn.Linear):
    """``torch.nn.Linear`` and ReLU: ``[*, in_features]`` to ``[*, out_features]``."""

    def __init__(self, *args: Any, backend: str = "skinfast", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._function = op("linear_relu", backend)

    def forward(self, input: Tensor) -> Tensor:
        return self._function(input, self.weight, self.bias)


class _BatchNorm(nn.modules.batchnorm._NormBase):
    """torch.nn.BatchNorm2d's parameters and statistics, for any input with channels second.

    Not a subclass of it: ``convert_sync_batchnorm`` would put a module in its place that does
    neither the ReLU nor the addition.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise SkinfastError(f"batch norm needs [N, C, ...]; got shape {tuple(input.shape)}")

    def statistics(self) -> dict[str, Any]:
        """The arguments but weight and bias that torch.nn.BatchNorm2d.forward would pass on.

        One call a step: in training it counts the batch.
        """
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        use_running = not self.training or self.track_running_stats
        return {
            "running_mean": self.running_mean if use_running else None,
            "running_var": self.running_var if use_running else None,
            "training": self.training or self.running_mean is None,
            "momentum": momentum,
            "eps": self.eps,
        }


class BatchNorm(_BatchNorm):
    """Batch normalisation over all but the channels, ``[N, C, ...]``; ``relu=True`` adds a ReLU."""

    def __init__(self, *args: Any, relu: bool = False, backend: str = "skinfast", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.relu = relu
        self._function = op("batch_norm_relu", backend)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return self._function(
            input, weight=self.weight, bias=self.bias, relu=self.relu, **self.statistics()
        )


class BatchNormAddReLU(_BatchNorm):
    """``relu(batch_norm(input) + residual)``: the end of a residual block."""

    def __init__(self, *args: Any, backend: str = "skinfast", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._function = op("batch_norm_add_relu", backend)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        self._check_input_dim(input)
        return self._function(
            input, residual, weight=self.weight, bias=self.bias, **self.statistics()
        )


class MaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` that keeps one byte an output for its gradient."""

    def __init__(self, *args: Any, backend: str = "skinfast", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.return_indices:
            raise SkinfastError("return_indices=True is not offered; use torch.nn.MaxPool2d")
        self._function = op("max_pool2d", backend)

    def forward(self, input: Tensor) -> Tensor:
        return self._function(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` for class indices: ``[N, C]`` and ``[N]``."""

    def __init__(self, *args: Any, backend: str = "skinfast", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._function = op("cross_entropy", backend)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self._function(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
