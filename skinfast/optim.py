"""Adam on the fused op: one call a step for all parameters of a group."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from skinfast import arena
from skinfast.ops.adam import adam_

_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Adam(Optimizer):
    r"""``torch.optim.Adam`` in its arguments, its results and its state, at the speed of a copy.

    The formula stands at :func:`skinfast.ops.adam.adam_`. Parameters without a gradient are passed
    over. The state dict is interchangeable with that of ``torch.optim.Adam``, in both directions
    and in the middle of a training. States that are made in one step lie one behind the other in
    one piece of memory (``skinfast.arena``); a file that is to hold a single one needs its clone.

    As in torch's fused Adam the steps are float32 tensors on the parameters' device, and
    :class:`torch.amp.GradScaler` hands over its scale and its verdict on infinities without
    waiting for the device. The gradients stay scaled: call ``scaler.unscale_(optimizer)`` first to
    clip or to log them.

    Args:
        params: tensors, or dictionaries that are parameter groups: float32, float64, bfloat16 or
            (CUDA) float16, also mixed, on one or more devices.
        lr: a number, or a tensor of one element; on a GPU that one is read when the step runs, so
            that a recorded CUDA graph follows a schedule which fills it.
        betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in torch.
        foreach, fused, capturable: kept in the groups for a ``torch.optim.Adam`` that loads the
            state dict, and not used: every step is fused, and once a first step, or
            ``make_states``, has made the state every one can be recorded into a CUDA graph.
        differentiable: must be False.

    Raises:
        ValueError: a setting is outside its range, or ``differentiable`` is asked for.
    """

    # torch.amp.GradScaler looks for this, then sets `grad_scale` and `found_inf` for the step.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(float(beta) for beta in betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own where ``param_group`` has them."""
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, also one that torch.optim.Adam made on another device or layout."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("amsgrad", "maximize", "differentiable", "decoupled_weight_decay"):
                group.setdefault(name, False)
            _check_settings(group)
            for param in group["params"]:
                _adopt(param, self.state.get(param, {}))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the loss of ``closure``, if given.

        Raises:
            RuntimeError: a gradient is sparse or complex, or the op refuses a tensor by name (one
                whose memory format was changed after its first step, for example).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            having_grad = [param for param in group["params"] if param.grad is not None]
            for device, params in _by_device(having_grad).items():
                self._update(group, device, params)
        return loss

    @torch.no_grad()
    def make_states(self) -> None:
        """Begin the state of every trained parameter that has none, as its first step would.

        For a step that is recorded before it has ever run. One that never gets a gradient keeps a
        state of zeros then, which no step reads.

        Raises:
            RuntimeError: a parameter is complex.
        """
        for group in self.param_groups:
            trained = [param for param in group["params"] if param.requires_grad]
            for device, params in _by_device(trained).items():
                self._begin(params, device, group["amsgrad"])

    def _update(self, group: dict[str, Any], device: torch.device, params: list[Tensor]) -> None:
        """One call of the op: the parameters of a group that are on one device."""
        amsgrad = group["amsgrad"]
        grads = [_dense_grad(param) for param in params]
        self._begin(params, device, amsgrad)
        states = [self.state[param] for param in params]
        beta1, beta2 = group["betas"]
        grad_scale, found_inf = (
            None if value is None else value.to(device, non_blocking=True)
            for value in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        )
        adam_(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if amsgrad else [],
            [state["step"] for state in states],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=amsgrad,
            maximize=group["maximize"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    def _begin(self, params: list[Tensor], device: torch.device, amsgrad: bool) -> None:
        """Make the states of those that have none, in arenas."""
        params = [param for param in params if not self.state.get(param)]
        if not params:
            return
        if any(param.is_complex() for param in params):
            raise RuntimeError(
                "Adam does not support complex parameters; optimise torch.view_as_real of them"
            )
        steps = torch.zeros(len(params), dtype=torch.float32, device=device)
        names = _STATES if amsgrad else _STATES[:2]
        states = {name: arena.zeros_like(params) for name in names}
        for i, param in enumerate(params):
            self.state[param]["step"] = steps[i].data
            for name, values in states.items():
                self.state[param][name] = values[i]


def _by_device(params: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    result: dict[torch.device, list[Tensor]] = {}
    for param in params:
        result.setdefault(param.device, []).append(param)
    return result


def _dense_grad(param: Tensor) -> Tensor:
    grad = param.grad
    assert grad is not None
    if grad.is_sparse:
        raise RuntimeError("Adam does not support sparse gradients; use torch.optim.SparseAdam")
    return grad


def _check_settings(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr has {lr.numel()} elements; a tensor lr needs 1")
    if not lr >= 0.0:
        raise ValueError(f"lr is {lr}; it needs to be at least 0")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0.0:
            raise ValueError(f"{name} is {group[name]}; it needs to be at least 0")
    for i, beta in enumerate(group["betas"]):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}] is {beta}; it needs to be in [0, 1)")
    if group["differentiable"]:
        raise ValueError("differentiable=True is not supported; use torch.optim.Adam for it")


def _adopt(param: Tensor, state: dict[str, Any]) -> None:
    """Bring a loaded state where the op needs it: the step on the device, the rest as param is."""
    if not state:
        return
    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)
    for name in _STATES:
        if name in state and state[name].stride() != param.stride():
            state[name] = torch.empty_like(param, requires_grad=False).copy_(state[name])
