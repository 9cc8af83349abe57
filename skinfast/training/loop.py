"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from skinfast import arena
from skinfast.data import CLASSES, DeviceBatches, class_weights
from skinfast.environment import own_commit
from skinfast.errors import DivergedError
from skinfast.models import build_model
from skinfast.nn import convert_sync_batch_norm
from skinfast.optim import Adam
from skinfast.training.averaging import MovingAverage
from skinfast.training.config import TrainConfig
from skinfast.training.distributed import DistributedStep, Processes
from skinfast.training.early_stopping import BestEpoch
from skinfast.training.heap import HeapTrimmer, give_back_freed_memory
from skinfast.training.losses import loss_function
from skinfast.training.model_file import ModelDescription, save_model
from skinfast.training.problem import Problem, prepare
from skinfast.training.run_folder import RunFolder
from skinfast.training.schedule import learning_rate_schedule
from skinfast.training.step import Totals, TrainStep


@contextlib.contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Have cuDNN choose among algorithms that give the same bits in every run."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@deterministic_convolutions()
def train(
    config: TrainConfig,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    problem: Problem | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> RunFolder:
    """Train a model and leave its weights, metrics and checkpoint in a run folder.

    A resumed run ends with the very weights of one that was never interrupted. Several processes
    of ``torch.distributed`` train together: each calls this and has a part of every batch, and the
    first writes the folder, calls ``on_epoch`` and shows progress.

    Args:
        config: the settings.
        output: the run folder; it must be new, unless ``resume``.
        resume: go on after the last epoch that ``output`` has a checkpoint of.
        problem: ``prepare(config)``, where the caller has it already.
        on_epoch: called with each finished epoch's line of metrics.jsonl.

    Raises:
        SkinfastError: a setting, the data or the run folder cannot be used.
        DivergedError: the loss stopped being finite.
        OSError: the run folder cannot be written.
    """
    own_commit()  # that of the code that trains, for result.json
    processes = Processes.current()
    problem = problem or processes.one_ahead(lambda: prepare(config))
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(CLASSES), config.image_size, config.backend)
    if config.sync_batch_norm and processes.count > 1:
        convert_sync_batch_norm(model, problem.device)
    processes.check_batch_size(config.batch_size, model)
    model.to(problem.device)
    arena.lay_out(model)
    run = RunFolder(output)
    opened = functools.partial(_open, run, config, problem.fingerprint(), resume)
    config, state, epochs = processes.from_first(opened)
    train_batches, test_batches = problem.train_batches(model), problem.test_batches()
    optimizer = Adam(
        model.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        decoupled_weight_decay=config.decoupled_weight_decay,
    )
    schedule = learning_rate_schedule(optimizer, config, len(train_batches))
    average = MovingAverage(model, config.ema_decay) if config.ema_decay else None
    best = BestEpoch(config.patience) if config.validation_fraction else None
    # What a checkpoint holds: everything that changes as the run goes on.
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "average": average,
        "best": best,
    }
    parts = {name: part for name, part in parts.items() if part is not None}
    done = 0
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done = state["epoch"]

    train_labels = problem.dataset.labels[problem.train_indices]
    weight = class_weights(train_labels) if config.class_weights else None
    step = (TrainStep if processes.count == 1 else DistributedStep)(
        model,
        optimizer,
        loss_function(config, weight).to(problem.device),
        device=problem.device,
        precision=config.precision,
        capture=config.backend == "skinfast",
    )
    measured = model if average is None else average.module
    trim_heap = HeapTrimmer()

    for epoch in range(done + 1, config.epochs + 1):
        if best is not None and best.should_stop(epoch - 1):
            break
        started = time.perf_counter()
        model.train()
        train_batches.set_epoch(epoch)
        learning_rate = optimizer.param_groups[0]["lr"]
        title = f"epoch {epoch}/{config.epochs}"
        # None: a bar on a terminal, nothing elsewhere.
        hidden = None if processes.is_first else True
        with tqdm(total=len(train_batches), desc=title, disable=hidden, leave=False) as bar:

            def made(steps: int, bar: Any = bar) -> None:
                bar.update(steps)
                trim_heap()

            step.epoch(train_batches, schedule, average, made)
        train_loss, train_accuracy = step.take_totals()
        seconds = time.perf_counter() - started

        processes.take_buffers(measured)
        test_loss, test_accuracy = _test(measured, problem, test_batches, processes)
        line = {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "learning_rate": learning_rate,
            "seconds": seconds,
            "images_per_second": len(train_batches.indices) / seconds,
            "processes": processes.count,
        }
        if best is not None:
            line["validation_balanced_accuracy"] = _validate(measured, problem, processes)
        # What is decided below is decided by the same figures in every process.
        line = processes.value_of_first(line)
        epochs.append(line)
        if best is not None:
            best.see(epoch, line["validation_balanced_accuracy"], measured)
        if processes.is_first:
            run.write_metrics(epochs)
            if on_epoch:
                on_epoch(line)
        # The test loss tells of the last update too, which no training loss has seen yet.
        if not math.isfinite(line["train_loss"]) or not math.isfinite(line["test_loss"]):
            raise DivergedError(
                f"the loss is not finite after epoch {epoch}; lower --lr (it is {config.lr})"
            )
        if processes.is_first:
            run.save_checkpoint(
                {
                    "model_name": config.model,
                    "data": problem.fingerprint(),
                    "epoch": epoch,
                    **{name: part.state_dict() for name, part in parts.items()},
                }
            )

    give_back_freed_memory()
    if best is not None:
        measured.load_state_dict(best.weights)
    if processes.is_first:
        description = ModelDescription(
            config.model, config.image_size, CLASSES, problem.mean, problem.std
        )
        save_model(run.model_file, measured, description)
    return run


def _open(
    run: RunFolder, config: TrainConfig, fingerprint: str, resume: bool
) -> tuple[TrainConfig, dict[str, Any] | None, list[dict[str, Any]]]:
    """Begin a run in its folder, or read what it had finished: settings, checkpoint, epochs."""
    if not resume:
        run.create(config)
        return config, None, []
    config = TrainConfig.load(run.config_file).continued_by(dataclasses.asdict(config))
    state = run.load_checkpoint(config, fingerprint)
    done = state["epoch"] if state else 0
    epochs = run.read_metrics(up_to_epoch=done)
    # Nothing before this line changes the folder: what is refused stays as it was.
    if done < config.epochs:
        run.remove_results()
    config.save(run.config_file)
    return config, state, epochs


def _test(
    model: nn.Module, problem: Problem, batches: DeviceBatches, processes: Processes
) -> tuple[float, float]:
    """Mean loss and accuracy over the test images."""
    logits = processes.logits_of(model, batches, problem.device, problem.config.precision)
    labels = problem.dataset.labels[problem.split.test].to(problem.device)
    totals = Totals(problem.device)
    totals.add(nn.functional.cross_entropy(logits, labels), logits, labels)
    return totals.take()


def _validate(model: nn.Module, problem: Problem, processes: Processes) -> float:
    """Balanced accuracy over the validation part; the test images have no say in it."""
    batches, precision = problem.validation_batches(), problem.config.precision
    logits = processes.logits_of(model, batches, problem.device, precision).cpu()
    labels = problem.dataset.labels[problem.validation_indices]
    right = torch.bincount(labels[logits.argmax(1) == labels], minlength=len(CLASSES))
    count = torch.bincount(labels, minlength=len(CLASSES))
    present = count > 0
    return float((right[present] / count[present]).mean())
