"""A training step recorded once as its list of ops, then replayed without what surrounds them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

import skinfast.ops  # noqa: F401  (registers adam_)
from skinfast import arena
from skinfast.training.heap import give_back_freed_memory

# Parameters that are updated together: enough of them to feed all threads, few enough for a cache.
_UPDATE_BYTES = 2**23
_ADAM = torch.ops.skinfast.adam_.default
_CAST = torch.ops.aten._to_copy.default
_DETACH = torch.ops.aten.detach.default
_ADD = torch.ops.aten.add.Tensor
_ADD_IN_PLACE = torch.ops.aten.add_.Tensor
_BLOCK_TAIL_BACKWARD = torch.ops.skinfast.batch_norm_add_relu_backward.default
_ADD_TO_ALL = torch.ops.aten._foreach_add_.Scalar


class LowPrecisionCopies:
    """The parameters in the dtype that autocast computes in, shared by the recordings of a model.

    A recording's Adam writes the copies of the parameters that it updates. Whatever else changes a
    parameter, in place as torch's own functions do, changes its version, and the copy is made anew
    before the next replay.
    """

    def __init__(self) -> None:
        self._copies: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}

    def of(self, parameters: dict[Tensor, torch.dtype]) -> list[Tensor]:
        """The copies; made, in an arena, where there are none yet."""
        new = {p: dtype for p, dtype in parameters.items() if p not in self._copies}
        made = arena.zeros_like(list(new), list(new.values()))
        self._copies.update(zip(new, made, strict=True))
        self._versions.update(dict.fromkeys(new, -1))
        return [self._copies[parameter] for parameter in parameters]

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
    costs more than the ops of a small model and a tenth of ResNet-50's at 32x32. Recording computes
    nothing. A replay makes the calls of an eager step on the same tensors and on new inputs, so its
    results are the eager ones bit for bit; what the step read from Python stays as it was, shapes
    and numbers included, except for Adam's learning rates. Counts of steps are made in one call,
    and on a CPU the tail of a residual block adds the two gradients of its output itself.

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
        recording = _Recording(step, inputs)
        self._copies = copies
        self._copied = recording.fold_casts(copies)
        self._groups = recording.lift_learning_rates(optimizer)
        recording.join_counts()
        self._updated = recording.updated()
        if self._updated and self._updated[0].device.type == "cpu":
            recording.join_gradients()  # the GPU's kernels read one gradient
            recording.split_updates()  # a GPU has no cache for it, and every part is a launch
        self._function, self._constants = recording.function()
        # Small objects scattered between the large ones just freed would keep those apart, and the
        # next step would take new memory beside them; and what was freed is not what a step needs.
        del recording
        gc.collect()
        give_back_freed_memory()

    def replay(self, *inputs: Tensor) -> None:
        """Run it on other inputs."""
        self.refresh()
        self.run(*inputs)

    def refresh(self) -> None:
        """Bring up to date what others than replays may have changed."""
        self._copies.refresh(self._copied)

    def run(self, *inputs: Tensor) -> None:
        """Replay without ``refresh``: nobody else has changed a parameter since."""
        learning_rates = [float(group["lr"]) for group in self._groups]
        # The inference mode passes over autograd's kernels, and with them over the versions.
        with torch.inference_mode():
            self._function(*inputs, *learning_rates, *self._constants)
        torch.autograd.graph.increment_version(self._updated)
        self._copies.written(self._copied)


class _Recording:
    """The graph of a step on its way to a function of inputs, learning rates and constants."""

    def __init__(self, step: Callable[..., None], inputs: Sequence[Tensor]) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx  # slow to import

        # Fake tensors: nothing is computed. A bound method's `self` would count as one more input.
        trace = make_fx(
            lambda *arguments: step(*arguments), tracing_mode="fake", _allow_non_fake_inputs=True
        )
        self._module = trace(*inputs)
        self._graph = self._module.graph
        # The range that an optimizer's step opens and closes for the profiler.
        marks = [n for n in self._graph.nodes if str(n.target).startswith("profiler.")]
        for node in reversed(marks):
            self._graph.erase_node(node)
        self._adams = self._graph.find_nodes(op="call_function", target=_ADAM)

    def updated(self) -> list[Tensor]:
        """The parameters that Adam updates."""
        return [self._value(node) for adam in self._adams for node in adam.args[0]]

    def fold_casts(self, copies: LowPrecisionCopies) -> list[Tensor]:
        """Let Adam convert what surrounds it; the parameters for which it does."""
        folded = [value for adam in self._adams for value in self._fold_casts(adam, copies)]
        self._graph.eliminate_dead_code()  # the gradients' casts
        return folded

    def lift_learning_rates(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """Make them inputs; the groups that they belong to. A tensor is read by the op itself."""
        groups = []
        for i, adam in enumerate(self._adams):
            if adam.kwargs["lr_tensor"] is not None:
                continue
            adam.update_kwarg("lr", self._add_input(f"learning_rate_{i}"))
            first = self._value(adam.args[0][0])
            groups += [
                group
                for group in optimizer.param_groups
                if any(p is first for p in group["params"])
            ]
        return groups

    def join_counts(self) -> None:
        """Count in one call what counts steps and is not read: 53 batch norms of ResNet-50 do.

        A tensor that is read by way of another one, which shared its memory before the step, would
        be read too early; the buffers of a model are no such.
        """
        uses: dict[Any, list[tuple[fx.Node, fx.Node]]] = {}
        for node in self._graph.find_nodes(op="get_attr"):
            uses.setdefault(node.target, []).extend((node, user) for user in node.users)
        counted: list[fx.Node] = []
        for value, add in (pairs[0] for pairs in uses.values() if len(pairs) == 1):
            if add.target != _ADD_IN_PLACE or add.args != (value, 1) or add.kwargs or add.users:
                continue
            counted.append(value)
            self._graph.erase_node(add)
        if counted:
            with self._graph.inserting_before(self._graph.output_node()):
                self._graph.call_function(_ADD_TO_ALL, (counted, 1))

    def split_updates(self) -> None:
        """Update parameters some megabytes at a time, as soon as their gradients are there.

        A gradient is then read while a cache still holds it, and its memory serves the next ones.
        """
        for adam in self._adams:
            nodes = list(self._graph.nodes)
            places = {node: i for i, node in enumerate(nodes)}
            last_reads: dict[Any, int] = {}
            for node in self._graph.find_nodes(op="get_attr"):
                last = _last_read(node, places, but=adam)
                last_reads[node.target] = max(last, last_reads.get(node.target, 0))
            parameters, *_, copies = adam.args
            # One may change behind its gradient and behind all that reads it or its copy; and what
            # the update takes must be there.
            lists = [nodes for nodes in adam.args if nodes]
            ready = [
                max(
                    last_reads[parameter.target],
                    last_reads[copies[i].target],
                    *(places[taken[i]] for taken in lists),
                )
                for i, parameter in enumerate(parameters)
            ]
            part: list[int] = []
            for i in sorted(range(len(parameters)), key=ready.__getitem__):
                part.append(i)
                if sum(self._value(parameters[j]).nbytes for j in part) >= _UPDATE_BYTES:
                    self._update_part(adam, part, nodes[ready[i]])
                    part = []
            if part:
                self._update_part(adam, part, adam)
            self._graph.erase_node(adam)

    def join_gradients(self) -> None:
        """Let the tail of a residual block add the two gradients of its output as it reads them.

        The sum would be a pass over memory of its own. It is rounded as before.
        """
        for tail in self._graph.find_nodes(op="call_function", target=_BLOCK_TAIL_BACKWARD):
            total, *others = tail.args
            if total.target != _ADD or total.kwargs or len(total.users) != 1 or len(others) != 7:
                continue
            first, second = total.args
            nodes = [node for node in (first, second, others[0]) if isinstance(node, fx.Node)]
            kinds = {(node.meta["val"].shape, node.meta["val"].dtype) for node in nodes}
            if len(nodes) == 3 and len(kinds) == 1:
                tail.args = (first, *others, second)
                self._graph.erase_node(total)

    def _update_part(self, adam: fx.Node, part: list[int], behind: fx.Node) -> None:
        arguments: list[list[fx.Node]] = [list(nodes) for nodes in adam.args]  # type: ignore[arg-type]
        lists = [[nodes[i] for i in part] if nodes else [] for nodes in arguments]
        with self._graph.inserting_after(behind):
            self._graph.call_function(_ADAM, tuple(lists), dict(adam.kwargs))

    def function(self) -> tuple[Callable[..., Any], list[Tensor]]:
        """The step as a function, and its last arguments: parameters, buffers and state.

        A function finds arguments at once, attributes by a search.
        """
        values: list[Tensor] = []
        inputs: dict[Any, fx.Node] = {}
        for node in self._graph.find_nodes(op="get_attr"):
            if node.target not in inputs:
                values.append(self._value(node))
                inputs[node.target] = self._add_input(str(node.target))
            node.replace_all_uses_with(inputs[node.target])
            self._graph.erase_node(node)
        self._module.recompile()
        return partial(type(self._module).forward, None), values

    def _value(self, node: Any) -> Tensor:
        return getattr(self._module, node.target)

    def _add_input(self, name: str) -> fx.Node:
        inputs = self._graph.find_nodes(op="placeholder")
        first = next(iter(self._graph.nodes))
        behind = self._graph.inserting_after(inputs[-1]) if inputs else None
        with behind or self._graph.inserting_before(first):
            return self._graph.placeholder(name)

    def _get_constant(self, name: str, value: Tensor) -> fx.Node:
        self._module.register_buffer(name, value)
        with self._graph.inserting_before(next(iter(self._graph.nodes))):
            return self._graph.get_attr(name)

    def _fold_casts(self, adam: fx.Node, copies: LowPrecisionCopies) -> list[Tensor]:
        parameters, grads = list(adam.args[0]), list(adam.args[1])  # type: ignore[arg-type]
        readers: dict[Any, list[fx.Node]] = {}
        for node in self._graph.find_nodes(op="get_attr"):
            readers.setdefault(node.target, []).extend(user for user in node.users if user != adam)
        nothing = self._value(parameters[0]).new_empty(0)
        written = [self._get_constant("no_copy", nothing)] * len(parameters)
        folded: dict[Tensor, torch.dtype] = {}
        casts_of: dict[int, list[fx.Node]] = {}
        for i, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
            casts = readers[parameter.target]
            dtypes = {cast.kwargs.get("dtype") for cast in casts}
            source = _cast_source(grad)
            if source is None or len(dtypes) != 1 or any(c.target != _CAST for c in casts):
                continue
            (dtype,) = dtypes
            assert isinstance(dtype, torch.dtype)
            folded[self._value(parameter)] = dtype
            casts_of[i] = casts
            grads[i] = source
        for (i, casts), copy in zip(casts_of.items(), copies.of(folded), strict=True):
            written[i] = self._get_constant(f"copy_{parameters[i].target}", copy)
            for cast in casts:
                cast.replace_all_uses_with(written[i])
                self._graph.erase_node(cast)
        adam.args = (parameters, grads, *adam.args[2:6], written)
        return list(folded)


def _last_read(node: fx.Node, places: dict[fx.Node, int], but: fx.Node) -> int:
    """The last place where the memory of a node's value is read, as itself or as a view of it."""
    last = 0
    for user in node.users:
        if user == but:
            continue
        last = max(last, places[user])
        schema = getattr(user.target, "_schema", None)
        if schema is not None and any(result.alias_info for result in schema.returns):
            last = max(last, _last_read(user, places, but))
    return last


def _cast_source(grad: fx.Node) -> fx.Node | None:
    """What a gradient that only Adam reads was before autocast converted it back; None if not."""
    node = grad
    while node.target in (_DETACH, _CAST) and len(node.users) == 1:
        if node.target == _CAST:
            return node.args[0]  # type: ignore[return-value]
        node = node.args[0]  # type: ignore[assignment]
    return None
