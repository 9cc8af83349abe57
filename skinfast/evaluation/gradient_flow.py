"""How gradients reach the early layers: the paper's section 4, measured.

Equations 12 and 15 compare ``dE/dx`` at the layers of a network with skip connections and of one
without. Here that gradient is measured in both, and in the paper's CNN, before training and after
every epoch, on the same images.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from skinfast.data import CLASSES, Split
from skinfast.errors import DivergedError, SkinfastError
from skinfast.models import build_model, resnet50
from skinfast.nn import CrossEntropyLoss
from skinfast.optim import Adam
from skinfast.training.config import TrainConfig
from skinfast.training.problem import Problem, prepare

#: Name and the model of ``TrainConfig`` whose data layout it takes.
NETWORKS = {"resnet50": "resnet50", "resnet50-without-skips": "resnet50", "cnn": "cnn"}


def gradient_flow(
    config: TrainConfig,
    networks: tuple[str, ...] = tuple(NETWORKS),
    *,
    probe_images: int = 64,
    train_images: int | None = None,
    on_epoch: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train networks and measure their gradients on the way.

    Args:
        config: data, epochs, batch size, learning rate, seed and device; its model is ignored.
        networks: of ``NETWORKS``.
        probe_images: training images, drawn at random, on which everything is measured.
        train_images: train on as many, drawn at random; None means all.
        on_epoch: called with the network and each of its measurements.

    Returns:
        ``networks``: for each its ``name``, ``num_layers`` (with weights, on the main path),
        ``measurements``, the first before training (epoch 0): what ``measure`` returns, and
        ``epoch``; and ``diverged_in_epoch``, after which its loss was not finite and it was
        followed no further, or None. ``config``, ``probe_images`` and ``train_images`` beside it.

    Raises:
        SkinfastError: the data cannot be used, or a number is out of range.
        DivergedError: no network's loss is finite after the first epoch.
    """
    if unknown := [name for name in networks if name not in NETWORKS]:
        raise SkinfastError(
            f"there is no network {unknown[0]!r}; choose among {', '.join(NETWORKS)}"
        )
    problem = prepare(config)
    generator = np.random.default_rng(config.seed)
    count = len(problem.train_indices)
    for name, number in (("--probe-images", probe_images), ("--train-images", train_images)):
        if number is not None and not 2 <= number <= count:
            raise SkinfastError(f"{name} is {number}; it needs to be from 2 to {count}")
    probe = np.sort(generator.permutation(count)[:probe_images])
    chosen = np.sort(generator.permutation(count)[:train_images])
    probe, chosen = problem.train_indices[probe], problem.train_indices[chosen]
    results = []
    for name in networks:
        own = dataclasses.replace(
            problem,
            config=dataclasses.replace(config, model=NETWORKS[name]),
            train_indices=chosen,
        )
        images = dataclasses.replace(
            own,
            config=dataclasses.replace(own.config, batch_size=len(probe)),
            split=Split(problem.split.train, probe),
        ).test_batches()
        (batch,) = list(images)
        results.append(_follow(name, own, batch, on_epoch))
    if all(network["diverged_in_epoch"] == 1 for network in results):
        raise DivergedError(
            f"the loss of {' and '.join(networks)} is not finite after epoch 1; lower --lr (it is "
            f"{config.lr})"
        )
    return {
        "networks": results,
        "config": dataclasses.asdict(config),
        "probe_images": len(probe),
        "train_images": len(chosen),
    }


def _build(name: str, problem: Problem) -> nn.Module:
    config = problem.config
    torch.manual_seed(config.seed)
    if name != "resnet50-without-skips":
        return build_model(config.model, len(CLASSES), config.image_size, config.backend)
    model = resnet50(len(CLASSES), config.image_size, config.backend, skip_connections=False)
    for parameter in model.parameters():  # as build_model stores those of resnet50
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def _follow(
    name: str,
    problem: Problem,
    probe: tuple[Tensor, Tensor],
    on_epoch: Callable[[str, dict[str, Any]], None] | None,
) -> dict[str, Any]:
    """Train one network and measure it before, and after every epoch."""
    config = problem.config
    model = _build(name, problem).to(problem.device)
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    optimizer = Adam(model.parameters(), **options)
    loss_function = CrossEntropyLoss(backend=config.backend)
    batches = problem.train_batches()
    measurements: list[dict[str, Any]] = []
    diverged_in_epoch = None
    for epoch in range(config.epochs + 1):
        if epoch > 0:
            model.train()
            batches.set_epoch(epoch)
            for images, labels in tqdm(batches, f"{name} epoch {epoch}", disable=None, leave=False):
                optimizer.zero_grad(set_to_none=True)
                loss_function(model(images), labels).backward()
                optimizer.step()
        # A copy is measured: running statistics and moments of the network stay as they were.
        twin = copy.deepcopy(model)
        twin_optimizer = Adam(twin.parameters(), **options)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        measured = {"epoch": epoch, **measure(twin, twin_optimizer, *probe)}
        if epoch > 0 and not math.isfinite(measured["loss"]):
            diverged_in_epoch = epoch
            break
        measurements.append(measured)
        if on_epoch:
            on_epoch(name, measured)
    return {
        "name": name,
        "num_layers": sum(not layer["shortcut"] for layer in measurements[0]["layers"]),
        "measurements": measurements,
        "diverged_in_epoch": diverged_in_epoch,
    }


def measure(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> dict[str, Any]:
    """One training step on a batch, watched. The model is changed by it.

    Depth counts the layers with weights, from 1 at the image, in the order in which they compute;
    those on a shortcut ("downsample") count for none.

    Args:
        model: images ``[N, 3, H, W]`` to logits.
        optimizer: over its parameters.
        images, labels: the batch.

    Returns:
        ``loss``, ``accuracy`` and

        - ``stream``: at each ``depth``, with the ``name`` of the module whose output x it is,
          ``gradient``: the mean over images of the norm of dE/dx, E being the sum of the batch's
          losses. Without batch normalisation that is the gradient of the image's own loss; with
          it, what the image does to the losses of the others is in it too;
        - ``layers``: of each weight tensor ``name``, ``depth``, ``shortcut``, ``gradient`` (norm of
          the mean loss's gradient), ``norm``, and ``update_ratio``, norm of the step over norm;
        - ``relus``: of each module that ends in a ReLU ``name``, ``depth`` and the shares of its
          units (positions of the module's output, so behind its pool where it has one) and
          channels that are 0 for every image: ``dead_units``, ``dead_channels``.
    """
    watched = _Watch(model)
    model.train()
    optimizer.zero_grad(set_to_none=True)
    logits = model(images)
    loss = nn.functional.cross_entropy(logits, labels)
    points = watched.stream
    gradients = torch.autograd.grad(loss, [x for _, _, x in points], retain_graph=True)
    loss.backward()
    watched.stop()
    weights = [module.weight for _, module, _, _ in watched.layers]
    before = [weight.detach().clone() for weight in weights]
    weight_gradients = [_norm(weight.grad) for weight in weights]
    optimizer.step()
    return {
        "loss": float(loss.detach()),
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "stream": [
            {
                "name": name,
                "depth": depth,
                # Of the sum of the losses: that of the mean is divided by the number of images.
                "gradient": float((g.flatten(1).double().norm(dim=1) * len(images)).mean()),
            }
            for (name, depth, _), g in zip(points, gradients, strict=True)
        ],
        "layers": [
            {
                "name": name,
                "depth": depth,
                "shortcut": shortcut,
                "gradient": gradient,
                "norm": _norm(old),
                "update_ratio": _norm(weight.detach() - old) / max(_norm(old), 1e-30),
            }
            for (name, _, depth, shortcut), weight, old, gradient in zip(
                watched.layers, weights, before, weight_gradients, strict=True
            )
        ],
        "relus": watched.relus,
    }


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(tensor.detach().double().norm())


class _Watch:
    """Writes down, in the order of computing, layers, block outputs and dead ReLUs."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[tuple[str, Any, int, bool]] = []
        self.stream: list[tuple[str, int, Tensor]] = []
        self.relus: list[dict[str, Any]] = []
        self._depth = 0
        self._stream = _stream_modules(model)
        named = [(name, module) for name, module in model.named_modules() if name]
        self._handles = [
            module.register_forward_hook(self._hook(name, module)) for name, module in named
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, module: nn.Module) -> Callable[..., None]:
        weight = module._parameters.get("weight")
        has_weights = weight is not None and weight.dim() >= 2
        # As the modules of skinfast.nn say it: a flag, or their name.
        ends_in_relu = getattr(module, "relu", False) is True or "ReLU" in type(module).__name__

        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if has_weights:
                shortcut = "downsample" in name
                self._depth += not shortcut
                self.layers.append((name, module, self._depth, shortcut))
            if ends_in_relu:
                zero = (output.detach() == 0).all(0)
                dead_channels = zero.flatten(1).all(1) if zero.dim() > 1 else zero
                self.relus.append(
                    {
                        "name": name,
                        "depth": self._depth,
                        "dead_units": float(zero.float().mean()),
                        "dead_channels": float(dead_channels.float().mean()),
                    }
                )
            # Of several modules at one depth (convolution, normalisation, pool) the last is x.
            if name in self._stream:
                if self.stream and self.stream[-1][1] == self._depth:
                    self.stream.pop()
                self.stream.append((name, self._depth, output))

        return hook


def _stream_modules(model: nn.Module) -> set[str]:
    """Names of the modules that the image passes one after the other: children, stages opened."""
    names = set()
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential):
            names |= {f"{name}.{inner}" for inner, _ in child.named_children()}
        else:
            names.add(name)
    return names
