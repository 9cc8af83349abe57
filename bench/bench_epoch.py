"""Whole epochs of the three models: time, images a second, memory, power, accuracy.

python bench/bench_epoch.py --device cuda --output epoch.json     # about 3 minutes on an H100
python bench/bench_epoch.py --device cuda --compile --model cnn   # adds torch.compile's long search
python bench/bench_epoch.py --device cpu --quick

Every contender has the same images on the device, in the same precision, and trains on full batches
alone. PyTorch's are eager, the whole step in a CUDA graph, and torch.compile(mode="max-autotune"),
each with channels_last where the model is convolutional, autocast and Adam(fused=True).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_models import IMAGE_SIZES, LEARNING_RATE, TOLERANCES, problem_for, tolerance
from harness import ResultsDifferError, Row, Timing, take_turns
from power import mean_watts
from report import Report, bench_of, parser, run
from trainers import PyTorch, PyTorchGraph, Skinfast, Trainer, assert_same_training

from skinfast.models import MODELS
from skinfast.training.problem import Problem
from skinfast.training.step import logits_of

Build = Callable[[Problem], Trainer]
# Of a learning that is compared by its outcome; the steps are compared at a small one (see there).
ACCURACY_LEARNING_RATE = 1e-3
# Between trainings whose images come in another order; a contender that learns nothing is further.
ACCURACY_TOLERANCE = 0.1
# The power of an epoch that takes less is that of several.
POWER_SECONDS = 1.0


def contenders(device: torch.device, model: str, compiled: bool) -> dict[str, Build]:
    """What can run on this device; the first is ours."""
    layout = "contiguous" if model == "logistic-regression" else "channels_last"
    builds: dict[str, Build] = {
        "skinfast": Skinfast,
        "eager": partial(PyTorch, layout=layout, compiled=False, fused=True),
    }
    if device.type == "cuda":
        builds["CUDA graph"] = partial(PyTorchGraph, layout=layout)
    if compiled:
        builds["compiled"] = partial(PyTorch, layout=layout, compiled=True, fused=True)
    return builds


def accuracy_after(build: Build, problem: Problem, epochs: int) -> float:
    """Test accuracy of a new model after so many epochs."""
    config = dataclasses.replace(problem.config, lr=ACCURACY_LEARNING_RATE)
    trainer = build(dataclasses.replace(problem, config=config))
    for _ in range(epochs):
        trainer.epoch()
    batches = problem.test_batches()
    logits = logits_of(trainer.model, batches, problem.device, config.precision)
    labels = torch.cat([labels for _, labels in batches])
    return (logits.argmax(1) == labels).float().mean().item()


def peak_bytes(device: torch.device, held: int, trainer: Trainer) -> int | None:
    """What a contender holds, and takes for an epoch beyond that; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    trainer.epoch()
    return held + torch.cuda.max_memory_allocated(device) - before


def held_bytes(device: torch.device) -> int:
    """Bytes of all tensors on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def compare(
    problem: Problem, builds: dict[str, Build], bench: Any, epochs: int
) -> tuple[Row, dict[str, dict[str, Any]]]:
    """Time the contenders in turns; a row of ours against the fastest, and facts of each.

    Raises:
        ResultsDifferError: they do not compute the same, and nothing was timed, or they learn
            differently.
    """
    device, config = problem.device, problem.config
    name = f"{config.model} {config.image_size}x{config.image_size} {config.precision}"
    trainers: dict[str, Trainer] = {}
    held = {}
    for contender, build in builds.items():
        before = held_bytes(device)
        trainers[contender] = build(problem)
        held[contender] = held_bytes(device) - before
    try:
        assert_same_training(problem, tolerance(config), trainers)
    except AssertionError as error:
        raise ResultsDifferError(f"{name}: results differ, so nothing was timed: {error}") from None
    memory = {c: peak_bytes(device, held[c], trainer) for c, trainer in trainers.items()}
    calls = {contender: trainer.epoch for contender, trainer in trainers.items()}
    timings = take_turns(calls, bench.stopwatch, bench.rounds, sample_seconds=0.0)
    watts = {c: mean_watts(device, call, POWER_SECONDS) for c, call in calls.items()}
    del calls, trainers
    accuracies = {c: accuracy_after(build, problem, epochs) for c, build in builds.items()}
    if max(accuracies.values()) - min(accuracies.values()) > ACCURACY_TOLERANCE:
        raise ResultsDifferError(f"{name}: accuracies after {epochs} epochs differ: {accuracies}")

    images = len(problem.train_indices)
    facts = {
        contender: {
            "epoch_seconds": timing.median,
            "images_per_second": images / timing.median,
            "memory": memory[contender],
            "watts": watts[contender],
            "accuracy": accuracies[contender],
        }
        for contender, timing in timings.items()
    }
    return _row(timings, memory), facts


def _row(timings: dict[str, Timing], memory: dict[str, int | None]) -> Row:
    ours, *others = timings
    modes = {name: timings[name].median for name in others}
    best = min(others, key=modes.__getitem__)
    return Row(ours, best, timings[ours], timings[best], modes, memory[ours], memory[best])


def _line(name: str, facts: dict[str, Any]) -> str:
    watts = facts["watts"]
    power = "" if watts is None else f", {watts:.0f} W, {watts * facts['epoch_seconds']:.1f} J"
    memory = "" if facts["memory"] is None else f", {facts['memory'] / 1e6:.0f} MB"
    return (
        f"    {name:<12}{facts['epoch_seconds'] * 1e3:>10.1f} ms"
        f"{facts['images_per_second']:>12.0f} images/s, accuracy {facts['accuracy']:.4f}"
        f"{memory}{power}"
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", default="synthetic", help="a folder of HAM10000, or synthetic")
    arguments.add_argument("--model", action="append", choices=list(MODELS), help="default: all")
    arguments.add_argument(
        "--image-size", action="append", type=int, choices=IMAGE_SIZES, help="default: both"
    )
    arguments.add_argument("--batch-size", type=int, default=256)
    arguments.add_argument("--precision", choices=list(TOLERANCES), help="default: by device")
    arguments.add_argument("--epochs", type=int, default=3, help="to compare accuracies after")
    arguments.add_argument("--compile", action="store_true", help="add torch.compile (minutes)")
    options = arguments.parse_args()
    bench = bench_of(options)
    on_gpu = bench.device.type == "cuda"
    precision = options.precision or ("bfloat16" if on_gpu else "float32")
    columns = {"model": 21, "images": 9, "batch": 7, "precision": 11, "steps": 7}
    report = Report("Epochs with skinfast against PyTorch", columns, bench, options)
    report.note(learning_rate=LEARNING_RATE, accuracy_epochs=options.epochs)
    report.header("an epoch", "ms")
    for image_size in options.image_size or IMAGE_SIZES[-1 if options.quick else 0 :]:
        for model in options.model or MODELS:
            problem = problem_for(options, model, image_size, precision, options.batch_size)
            builds = contenders(bench.device, model, options.compile)
            row, facts = compare(problem, builds, bench, options.epochs)
            names = {
                "model": model,
                "images": f"{image_size}x{image_size}",
                "batch": options.batch_size,
                "precision": precision,
                "steps": len(problem.train_batches()),
            }
            report.add({**names, "contenders": facts}, row, "ms")
            for name, values in facts.items():
                report.note(_line(name, values))
    report.finish()


if __name__ == "__main__":
    sys.exit(run(main))
