"""Modules on the fused ops, with the parameters, names and initialisation of their torch.nn twins.

Every module takes ``backend``: "skinfast" runs the fused op, "torch" runs its reference in pure
PyTorch. The two have equal state_dicts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from skinfast.errors import SkinfastError
from skinfast.ops.batch_norm_relu_conv2d import batch_norm_relu_conv2d
from skinfast.ops.conv2d import conv2d
from skinfast.ops.conv2d_statistics import conv2d_statistics
from skinfast.ops.conv2d_statistics import is_chosen as conv2d_statistics_is_chosen

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

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Stride, padding, dilation and groups."""
        return self.stride, self.padding, self.dilation, self.groups

    def gives_statistics(self, input: Tensor, of_gradient: bool = False) -> bool:
        """Whether the statistics of its output are had for less with it than without.

        Or, ``of_gradient``, the sums over its input's gradient that a batch norm before it needs.
        """
        return (
            self._function is conv2d
            and self.bias is None
            and not isinstance(self.padding, str)
            and conv2d_statistics_is_chosen(
                input, self.weight, *self.geometry, of_gradient=of_gradient
            )
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


class Linear(nn.Linear):
    """``torch.nn.Linear``: ``[*, in_features]`` to ``[*, out_features]``."""

    def __init__(self, *args: Any, backend: str = "skinfast", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._function = op("linear", backend)

    def forward(self, input: Tensor) -> Tensor:
        return self._function(input, self.weight, self.bias)


class LinearReLU(nn.Linear):
    """``torch.nn.Linear`` and ReLU: ``[*, in_features]`` to ``[*, out_features]``."""

    def __init__(self, *args: Any, backend: str = "skinfast", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._function = op("linear_relu", backend)

    def forward(self, input: Tensor) -> Tensor:
        return self._function(input, self.weight, self.bias)


class _BatchNorm(nn.modules.batchnorm._NormBase):
    """torch.nn.BatchNorm2d's parameters and statistics, for any input with channels second.

    Not a subclass of it: torch's ``convert_sync_batchnorm`` would put a module in its place that
    does neither the ReLU nor the addition. ``convert_sync_batch_norm`` does both.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise SkinfastError(f"batch norm needs [N, C, ...]; got shape {tuple(input.shape)}")

    def statistics(self, of_batch: Tensor | None = None) -> dict[str, Any]:
        """The arguments but weight and bias that torch.nn.BatchNorm2d.forward would pass on.

        With them the statistics of the batch, where those are known. One call a step: in training
        it counts the batch.
        """
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        use_running = not self.training or self.track_running_stats
        arguments = {
            "running_mean": self.running_mean if use_running else None,
            "running_var": self.running_var if use_running else None,
            "training": self.training or self.running_mean is None,
            "momentum": momentum,
            "eps": self.eps,
        }
        return arguments if of_batch is None else {**arguments, "statistics": of_batch}


class BatchNorm(_BatchNorm):
    """Batch normalisation over all but the channels, ``[N, C, ...]``; ``relu=True`` adds a ReLU."""

    def __init__(self, *args: Any, relu: bool = False, backend: str = "skinfast", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.relu = relu
        self._function = op("batch_norm_relu", backend)

    def forward(self, input: Tensor, batch_statistics: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        return self._function(
            input,
            weight=self.weight,
            bias=self.bias,
            relu=self.relu,
            **self.statistics(batch_statistics),
        )


class BatchNormReLUMaxPool2d(_BatchNorm):
    """Batch normalisation of ``[N, C, H, W]``, ReLU and ``torch.nn.MaxPool2d``: a ResNet's stem.

    Takes the channels first, as torch.nn.BatchNorm2d, then what torch.nn.MaxPool2d takes, by name.
    """

    def __init__(
        self,
        *args: Any,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        ceil_mode: bool = False,
        backend: str = "skinfast",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.pool: dict[str, Any] = {
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "ceil_mode": ceil_mode,
        }
        self._function = op("batch_norm_relu_max_pool2d", backend)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return self._function(
            input, weight=self.weight, bias=self.bias, **self.statistics(), **self.pool
        )


class BatchNormAddReLU(_BatchNorm):
    """``relu(batch_norm(input) + residual)``: the end of a residual block."""

    def __init__(self, *args: Any, backend: str = "skinfast", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._function = op("batch_norm_add_relu", backend)

    def forward(
        self, input: Tensor, residual: Tensor, batch_statistics: Tensor | None = None
    ) -> Tensor:
        self._check_input_dim(input)
        return self._function(
            input,
            residual,
            weight=self.weight,
            bias=self.bias,
            **self.statistics(batch_statistics),
        )


def normalized_conv2d(conv: nn.Module, norm: nn.Module, input: Tensor, *residual: Tensor) -> Tensor:
    """``norm(conv(input), *residual)``.

    In training on a GPU, where the table of choices has measured that as faster, the convolution
    gives the statistics that the batch norm needs: see ``skinfast.ops.conv2d_statistics``.
    """
    return _normalized(norm, *_convolved(conv, norm, input), *residual)


def normalized_conv2ds(
    conv: nn.Module,
    norm: nn.Module,
    next_conv: nn.Module,
    next_norm: nn.Module,
    input: Tensor,
    *residual: Tensor,
) -> Tensor:
    """``next_norm(next_conv(norm(conv(input))), *residual)``: ``normalized_conv2d`` twice.

    Likewise, the second convolution's backward pass gives the sums that the one of the batch norm
    between the two needs: see ``skinfast.ops.batch_norm_relu_conv2d``.
    """
    between, statistics = _convolved(conv, norm, input)
    if not _gives_sums(norm, next_conv, between):
        between = _normalized(norm, between, statistics)
        return normalized_conv2d(next_conv, next_norm, between, *residual)
    between, statistics = _normalized_and_convolved(
        norm, next_conv, between, statistics, _takes_statistics(next_norm, next_conv, between)
    )
    return _normalized(next_norm, between, statistics, *residual)


def _normalized_and_convolved(
    norm: Any, conv: Any, input: Tensor, statistics: Tensor | None, return_statistics: bool
) -> tuple[Tensor, Tensor | None]:
    outputs = batch_norm_relu_conv2d(
        input,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        weight=conv.weight,
        stride=conv.stride,
        padding=conv.padding,
        return_statistics=return_statistics,
        **norm.statistics(statistics),
    )
    return outputs if isinstance(outputs, tuple) else (outputs, None)


def _gives_sums(norm: nn.Module, conv: nn.Module, input: Tensor) -> bool:
    """Whether ``conv(norm(input))`` is to be one op, for the sums in its gradient."""
    return (
        norm.training
        and torch.is_grad_enabled()
        and type(norm) is BatchNorm
        and norm.relu
        and type(conv) is Conv2d
        and not _has_hooks(norm)
        and not _has_hooks(conv)
        and conv.gives_statistics(input, of_gradient=True)
    )


def _takes_statistics(norm: nn.Module, conv: nn.Module, input: Tensor) -> bool:
    """Whether ``norm(conv(input))`` is to be given its statistics by the convolution."""
    return (
        norm.training
        and type(norm) in (BatchNorm, BatchNormAddReLU)
        and type(conv) is Conv2d
        and not _has_hooks(conv)
        and conv.gives_statistics(input)
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody waits for its forward to be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _convolved(conv: Any, norm: nn.Module, input: Tensor) -> tuple[Tensor, Tensor | None]:
    """The convolution, and where ``norm`` is to be given them its output's statistics."""
    if _takes_statistics(norm, conv, input):
        return conv2d_statistics(input, conv.weight, *conv.geometry)
    return conv(input), None


def _normalized(
    norm: nn.Module, input: Tensor, statistics: Tensor | None, *residual: Tensor
) -> Tensor:
    if statistics is None:
        return norm(input, *residual)
    return norm(input, *residual, batch_statistics=statistics)


class SyncBatchNorm(nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm``; ``residual`` is added, and ``relu=True`` adds a ReLU.

    It normalises by the statistics of all processes' batches together; one may be empty. On GPUs:
    torch's refuses the CPU, where ``CPUSyncBatchNorm`` does the same.
    """

    def __init__(
        self, *args: Any, relu: bool = False, pool: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.relu = relu
        self.pool = pool

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = super().forward(input)
        return _finished(output, residual, self.relu, self.pool)


def _finished(
    output: Tensor, residual: Tensor | None, relu: bool, pool: dict[str, Any] | None
) -> Tensor:
    """What a fused batch norm does behind the normalisation."""
    output = output if residual is None else output + residual
    output = F.relu(output) if relu else output
    return output if pool is None else F.max_pool2d(output, **pool)


class CPUSyncBatchNorm(_BatchNorm):
    """``SyncBatchNorm`` for the CPU, composed of PyTorch's functions."""

    def __init__(
        self, *args: Any, relu: bool = False, pool: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.relu = relu
        self.pool = pool

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        statistics = self.statistics()
        if statistics["training"] and dist.is_available() and dist.is_initialized():
            output = self._normalize_together(input, statistics["momentum"])
        else:
            output = F.batch_norm(input, weight=self.weight, bias=self.bias, **statistics)
        return _finished(output, residual, self.relu, self.pool)

    def _normalize_together(self, input: Tensor, momentum: float) -> Tensor:
        x = input if input.dtype == torch.float64 else input.float()
        reduced = [d for d in range(x.dim()) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        values = x.new_tensor([x.numel() / x.size(1)])  # of a channel; summed along
        sums = _SumOverProcesses.apply(torch.cat([x.sum(reduced), values]))
        count = sums[-1].detach()
        if count < 2:
            raise ValueError("batch norm needs more than one value a channel in training; got one")
        mean = sums[:-1] / count
        centered = x - mean.view(shape)
        variance = _SumOverProcesses.apply(centered.square().sum(reduced)) / count
        if self.running_mean is not None and self.running_var is not None:
            unbiased = variance.detach() * count / (count - 1)
            self.running_mean.lerp_(mean.detach().to(self.running_mean), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var), momentum)
        output = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of the processes' tensors, in each of them; so is its gradient."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


#: The modules that normalise by the batch at hand alone.
FUSED_BATCH_NORMS = (BatchNorm, BatchNormAddReLU, BatchNormReLUMaxPool2d)


def convert_sync_batch_norm(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Let every batch norm of this module within ``model`` normalise by all processes' batches.

    Parameters and buffers are the same tensors under the same names. Call it before the model is
    wrapped in ``torch.nn.parallel.DistributedDataParallel``.

    Args:
        device: where the model will be used.

    Returns:
        ``model``, changed in place.
    """
    kind = CPUSyncBatchNorm if torch.device(device).type == "cpu" else SyncBatchNorm
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, FUSED_BATCH_NORMS):
                twin = kind(
                    norm.num_features,
                    norm.eps,
                    norm.momentum,
                    norm.affine,
                    norm.track_running_stats,
                    relu=getattr(norm, "relu", True),
                    pool=getattr(norm, "pool", None),
                )
                for key, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
                    setattr(twin, key, tensor)
                setattr(parent, name, twin.train(norm.training))
    return model


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


class GlobalAveragePool2d(nn.Module):
    """The mean of every map, ``torch.nn.AdaptiveAvgPool2d(1)`` and ``Flatten``: to ``[N, C]``."""

    def __init__(self, backend: str = "skinfast") -> None:
        super().__init__()
        self._function = op("global_average_pool2d", backend)

    def forward(self, input: Tensor) -> Tensor:
        return self._function(input)


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
