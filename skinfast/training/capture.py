"""A training step recorded once as its list of ops, then replayed without what surrounds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

_ADAM = torch.ops.skinfast.adam_.default
_CAST = torch.ops.aten._to_copy.default
_DETACH = torch.ops.aten.detach.default


class LowPrecisionCopies:
    """The parameters in the dtype that autocast computes in, shared by the recordings of a model.

    A recording's Adam writes the copies of the parameters that it updates. Whatever else changes a
    parameter, in place as torch's own functions do, changes its version, and the copy is made anew
    before the next replay.
    """

    def __init__(self) -> None:
        self._copies: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}

    def of(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """The copy; made where there is none yet."""
        if parameter not in self._copies:
            self._copies[parameter] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            self._versions[parameter] = -1
        return self._copies[parameter]

    def refresh(self, parameters: Sequence[Tensor]) -> None:
        """Bring the copies of these parameters up to date."""
        for parameter in parameters:
            if self._versions[parameter] != parameter._version:
                self._copies[parameter].copy_(parameter.detach())
        self.written(parameters)

    def written(self, parameters: Sequence[Tensor]) -> None:
        """Take the copies of these parameters to be up to date."""
        for parameter in parameters:
            self._versions[parameter] = parameter._version


class CapturedStep:
    """The ops that a training step ran, in their order, to be run again.

    What lies between the ops of an eager step, modules, autograd, the optimizer's bookkeeping,
    costs more than the ops of a small model and a tenth of ResNet-50's at 32x32. Recording runs the
    step once, for real. A replay makes the same calls on the same tensors and on new inputs, so its
    results are the eager ones bit for bit; what the step read from Python stays as it was, shapes
    and numbers included, except for Adam's learning rates.

    Under autocast, a parameter that is used in lower precision only is no longer converted at every
    step, nor its gradient back: Adam takes the gradient as it is and writes the copy.

    Args:
        step: takes ``inputs``, works in place (its result is dropped), asks no tensor for its value
            and updates all parameters by ``optimizer``.
        inputs: tensors; a replay takes others of the same shapes, dtypes and strides.
        optimizer: its groups' learning rates are read at every replay.
        copies: one for all recordings of a model.
    """

    def __init__(
        self,
        step: Callable[..., None],
        inputs: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        copies: LowPrecisionCopies,
    ) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx  # slow to import

        # A bound method's `self` would count as one more input.
        self._module = make_fx(lambda *arguments: step(*arguments))(*inputs)
        graph = self._module.graph
        _drop_profiler_marks(graph)
        self._updated = [self._value(p) for adam in _adams(graph) for p in adam.args[0]]  # type: ignore[union-attr]
        self._copies = copies
        self._copied = [p for adam in _adams(graph) for p in self._fold_casts(adam)]
        self._groups = self._lift_learning_rates(optimizer)
        self._constants = self._lift_constants()
        self._module.recompile()

    def replay(self, *inputs: Tensor) -> None:
        """Run it on other inputs."""
        learning_rates = [float(group["lr"]) for group in self._groups]
        self._copies.refresh(self._copied)
        # The inference mode passes over autograd's kernels, and with them over the versions.
        with torch.inference_mode():
            self._module.forward(*inputs, *learning_rates, *self._constants)
        torch.autograd.graph.increment_version(self._updated)
        self._copies.written(self._copied)

    def _value(self, node: Any) -> Tensor:
        return getattr(self._module, node.target)

    def _fold_casts(self, adam: fx.Node) -> list[Tensor]:
        """Let Adam convert what surrounds it; the parameters for which it does."""
        graph = self._module.graph
        parameters, grads = list(adam.args[0]), list(adam.args[1])  # type: ignore[arg-type]
        readers: dict[Any, list[fx.Node]] = {}
        for node in graph.find_nodes(op="get_attr"):
            readers.setdefault(node.target, []).extend(user for user in node.users if user != adam)
        self._module.register_buffer("no_copy", torch.empty(0))
        with graph.inserting_before(next(iter(graph.nodes))):
            copies = [graph.get_attr("no_copy")] * len(parameters)
        folded = []
        for i, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
            casts = readers[parameter.target]
            dtypes = {cast.kwargs.get("dtype") for cast in casts if cast.target == _CAST}
            source = _cast_source(grad)
            if source is None or len(dtypes) != 1 or any(c.target != _CAST for c in casts):
                continue
            (dtype,) = dtypes
            assert isinstance(dtype, torch.dtype)
            value = self._value(parameter)
            name = f"copy_{parameter.target}"
            self._module.register_buffer(name, self._copies.of(value, dtype))
            with graph.inserting_before(next(iter(graph.nodes))):
                copies[i] = graph.get_attr(name)
            for cast in casts:
                cast.replace_all_uses_with(copies[i])
                graph.erase_node(cast)
            grads[i] = source
            folded.append(value)
        adam.args = (parameters, grads, *adam.args[2:6], copies)
        graph.eliminate_dead_code()  # the gradients' casts
        return folded

    def _lift_learning_rates(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """Make them inputs; the groups that they belong to."""
        groups = []
        for i, adam in enumerate(_adams(self._module.graph)):
            adam.update_kwarg("lr", _add_input(self._module.graph, f"learning_rate_{i}"))
            first = self._value(adam.args[0][0])  # type: ignore[index]
            groups += [
                group
                for group in optimizer.param_groups
                if any(p is first for p in group["params"])
            ]
        return groups

    def _lift_constants(self) -> list[Tensor]:
        """Parameters, buffers and state as arguments: a function finds those at once."""
        graph = self._module.graph
        values: list[Tensor] = []
        inputs: dict[Any, fx.Node] = {}
        for node in graph.find_nodes(op="get_attr"):
            if node.target not in inputs:
                values.append(self._value(node))
                inputs[node.target] = _add_input(graph, str(node.target))
            node.replace_all_uses_with(inputs[node.target])
            graph.erase_node(node)
        return values


def _adams(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=_ADAM)


def _cast_source(grad: fx.Node) -> fx.Node | None:
    """What a gradient that only Adam reads was before autocast converted it back; None if not."""
    node = grad
    while node.target in (_DETACH, _CAST) and len(node.users) == 1:
        if node.target == _CAST:
            return node.args[0]  # type: ignore[return-value]
        node = node.args[0]  # type: ignore[assignment]
    return None


def _drop_profiler_marks(graph: fx.Graph) -> None:
    """Take out the range that an optimizer's step opens and closes."""
    marks = [node for node in graph.nodes if str(node.target).startswith("profiler.")]
    for node in reversed(marks):
        graph.erase_node(node)


def _add_input(graph: fx.Graph, name: str) -> fx.Node:
    *_, last = graph.find_nodes(op="placeholder", sort=True)
    with graph.inserting_after(last):
        return graph.placeholder(name)
