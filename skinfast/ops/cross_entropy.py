"""Softmax and cross-entropy in one pass over the logits, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skinfast.ops._library import (
    SampleInput,
    refuse_double_backward,
    register_fake,
    register_float32,
)

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # torch's own numbers


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross-entropy of logits with class indices, as :func:`torch.nn.functional.cross_entropy`.

    With p = softmax(x), class weights w, label smoothing :math:`\varepsilon` and target t, the
    loss of a row and its gradient are

    .. math:: \ell &= -(1 - \varepsilon) w_t \log p_t
                      - \tfrac{\varepsilon}{C} \sum_c w_c \log p_c \\
              \partial \ell / \partial x_j &= p_j \bigl((1 - \varepsilon) w_t
                      + \tfrac{\varepsilon}{C} \sum_c w_c \bigr)
                      - [j = t] (1 - \varepsilon) w_t - \tfrac{\varepsilon}{C} w_j

    and the mean is :math:`\sum \ell / \sum w_t`. The softmax is never stored: two numbers a row
    are kept for the gradient. The sums over rows have a fixed order, so two runs are equal bit for
    bit.

    Args:
        input: logits ``[N, C]``, float32, float64, bfloat16 or (CUDA) float16.
        target: classes ``[N]``, int64, each from 0 to C - 1 or ``ignore_index``. Class
            probabilities are not supported.
        weight: ``[C]``, of input's dtype: how much each class counts.
        ignore_index: rows of this target have no loss and no gradient.
        reduction: "mean", "sum" or "none".
        label_smoothing: from 0 to 1: the part of the target that is spread over all classes.

    Returns:
        ``[]``, or ``[N]`` for "none"; of input's dtype. The mean of no rows is NaN.

    Raises:
        ValueError: reduction is not as above.
        RuntimeError: another argument is not as above. A target that is no class is found on the
            CPU alone; on CUDA, where a look at it would make the host wait, its row's loss and
            gradient are NaN.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"cross_entropy: reduction has {reduction!r}; it needs 'mean', 'sum' or 'none'"
        )
    loss, _, _ = torch.ops.skinfast.cross_entropy(
        input, target, weight, ignore_index, _REDUCTIONS[reduction], label_smoothing
    )
    return loss


def reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The same in pure PyTorch."""
    return F.cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@register_fake("cross_entropy")
def _(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = input.shape[0], _accumulate_dtype(input.dtype)
    loss = input.new_empty((rows,) if reduction == _REDUCTIONS["none"] else ())
    return loss, input.new_empty((rows, 2), dtype=dtype), input.new_empty((), dtype=dtype)


@register_fake("cross_entropy_backward")
def _(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    normalizers: Tensor,
    total_weight: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, target, weight, *ctx.settings = inputs
    _, normalizers, total_weight = output
    ctx.mark_non_differentiable(normalizers, total_weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, target, weight, normalizers, total_weight)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[2]:
        raise RuntimeError("cross_entropy: weight requires a gradient; it needs to be a constant")
    if grad_loss is None:
        return (None,) * 6
    input, target, weight, normalizers, total_weight = ctx.saved_tensors
    grad = torch.ops.skinfast.cross_entropy_backward(
        grad_loss, input, target, weight, normalizers, total_weight, *ctx.settings
    )
    return grad, None, None, None, None, None


torch.library.register_autograd("skinfast::cross_entropy", _backward, setup_context=_setup_context)
refuse_double_backward("cross_entropy_backward")
register_float32("cross_entropy", 0, 2)


def sample_inputs(device: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    """The paper's seven classes, vectors' tails, many rows, every setting, one class, no row."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[str, tuple[int, int], bool, dict[str, Any]]] = [
        ("7-classes", (33, 7), False, {}),
        ("weighted", (70, 7), True, {}),
        ("20-classes", (40, 20), True, {}),
        ("many-rows", (600, 3), True, {"label_smoothing": 0.1}),
        ("more-rows", (1030, 5), False, {}),
        ("sum", (5, 16), True, {"reduction": "sum"}),
        ("none", (9, 37), True, {"reduction": "none", "label_smoothing": 0.2}),
        ("smooth", (20, 100), False, {"label_smoothing": 0.1, "ignore_index": 3}),
        ("smooth-weighted", (20, 7), True, {"label_smoothing": 0.1, "ignore_index": 3}),
        ("one-class", (4, 1), False, {}),
        ("no-row", (0, 7), False, {"reduction": "sum"}),
    ]
    for name, (rows, classes), weighted, settings in cases:
        logits = 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
        target = torch.randint(classes, (rows,), generator=generator)
        weight = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.5
        yield SampleInput(
            name,
            (
                logits.to(device, dtype).requires_grad_(),
                target.to(device),
                weight.to(device, dtype) if weighted else None,
            ),
            settings,
        )
