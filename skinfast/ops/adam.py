"""One step of Adam for every parameter of a group, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

import skinfast.ops._library  # noqa: F401  (loads the compiled ops)


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    copies: list[Tensor] | None = None,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""Advance parameters and state by one step of Adam, in one pass over memory.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{\eta}{1 - \beta_1^t} \cdot
                    \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    The paper's section 3, in the order of operations of ``torch.optim.Adam``. ``weight_decay``
    :math:`\lambda` adds :math:`\lambda \theta` to the gradient, or, decoupled, first multiplies
    :math:`\theta` by :math:`1 - \eta \lambda`; ``amsgrad`` puts the largest :math:`v` so far in
    the place of :math:`v_t`; ``maximize`` negates the gradient.

    Nothing waits for the device, so a CUDA graph can record the call.

    Args:
        params: tensors of any shapes, float32, float64, bfloat16 or (CUDA) float16, also mixed;
            of any dense layout (contiguous, channels_last, ...), all on one device.
        grads: of the shape and dtype of each parameter, in any layout. They are left as they are,
            also where ``grad_scale`` is given (torch's fused Adam writes them back unscaled).
        exp_avgs, exp_avg_sqs: the state :math:`m` and :math:`v`, as ``zeros_like`` of each
            parameter makes it.
        max_exp_avg_sqs: as those with ``amsgrad``, else empty.
        state_steps: one float32 on the device for each parameter, the number of steps made; this
            call advances it.
        copies: for mixed precision, a tensor for each parameter. Where one has elements, the
            gradient came in the lower precision in which the parameter was used: bfloat16, or
            (CUDA) float16, for a float32 parameter; this copy, as the gradient in dtype and as the
            parameter in strides, is written along with it. So neither is converted in a pass of
            its own.
        lr: a number, or a tensor of one element. A tensor on the parameters' device is read when
            the step runs, so that a recorded CUDA graph follows it (without a conversion where it
            is float64); one on the CPU for parameters on a GPU is read at the call.
        grad_scale: float32, one element: the gradients are divided by it.
        found_inf: float32, one element: where it is not 0, nothing changes, the steps included.

    Raises:
        RuntimeError: lengths of the lists, shapes, dtypes or devices do not match, a parameter is
            not dense, its state has other strides, or a setting is outside its range.
    """
    if not params:
        return  # no tensor that says on which device
    lr_tensor = None
    if isinstance(lr, Tensor):
        if lr.device.type == params[0].device.type or lr.device.type != "cpu":
            lr_tensor = lr.to(params[0].device, torch.float64, non_blocking=True)
        lr = lr.item() if lr_tensor is None else 0.0
    torch.ops.skinfast.adam_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        state_steps,
        copies or [],
        lr=lr,
        lr_tensor=lr_tensor,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=amsgrad,
        maximize=maximize,
        decoupled_weight_decay=decoupled_weight_decay,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    # A graph that saved a parameter must notice, as after torch's own in-place ops.
    torch.autograd.graph.increment_version(params)


@torch.library.register_fake("skinfast::adam_")
def _(params: list[Tensor], *args: object, **kwargs: object) -> None:
    return None
