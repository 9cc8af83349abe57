"""Training of the three models against the best of PyTorch's modes.

python bench/bench_models.py --device cpu                    # about half an hour on two cores
python bench/bench_models.py --model cnn --quick
python bench/bench_models.py --data data/ham10000 --scaling --output models.json

On a GPU a step of skinfast is not captured when it is made by itself, as it is within an epoch:
bench_epoch.py compares there, all sides in CUDA graphs.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from harness import Bench, Contender, Row
from report import Report, bench_of, parser, run
from trainers import PyTorch, Skinfast, Trainer, Update, assert_same_training, assert_same_updates

from skinfast.data import LesionDataset
from skinfast.models import MODELS
from skinfast.training import TrainConfig, prepare
from skinfast.training.config import PRECISIONS
from skinfast.training.problem import Problem

IMAGE_SIZES = (64, 32)
MODES = tuple(itertools.product(("contiguous", "channels_last"), (False, True)))
#: Layout and whether compiled, with torch.compile's mode on a GPU.
Modes = Mapping[tuple[str, bool], str]
# Adam first moves every weight by the learning rate, up or down, however small its gradient: where
# that is all rounding, contenders part, PyTorch's modes from each other too. A small rate, which
# costs the same time, keeps the losses of the first steps comparable.
LEARNING_RATE = 1e-5
TOLERANCES = {"float32": 5e-3, "bfloat16": 5e-2}
# A sample of a step is at least this long, and an epoch is timed whole up to the second.
STEP_SECONDS, EPOCH_SECONDS = 0.2, 5.0
SCALING = {
    "batch": (16, 32, 64, 128, 256, 512),
    "threads": (1, 2),
    "image": (28, 32, 64, 128, 224),
}


@lru_cache(maxsize=2)
def load(data: str, image_size: int, device: str) -> Problem:
    """The data at one size, split as `skinfast train` does."""
    return prepare(TrainConfig(data=data, image_size=image_size, device=device))


def tolerance(config: TrainConfig) -> float:
    """How far apart the losses of the first steps may be, relatively."""
    # At the third step PyTorch's two layouts part by up to 0.044 there (ten seeds), and skinfast
    # once by 0.063 from compiled PyTorch: the last maps are single pixels.
    if (config.model, config.image_size, config.precision) == ("resnet50", 32, "bfloat16"):
        return 1e-1
    return TOLERANCES[config.precision]


def problem_for(
    options: Any, model: str, image_size: int, precision: str, batch_size: int = 64
) -> Problem:
    """A model's problem with full batches only: torch.compile compiles anew for a last, odd one."""
    stored = max(size for size in IMAGE_SIZES if size <= max(image_size, min(IMAGE_SIZES)))
    problem = load(options.data, stored, options.device)
    config = dataclasses.replace(
        problem.config,
        model=model,
        lr=LEARNING_RATE,
        image_size=image_size,
        precision=precision,
        batch_size=batch_size,
    )
    full = len(problem.train_indices) // batch_size * batch_size
    return dataclasses.replace(
        problem,
        config=config,
        dataset=resized(problem.dataset, image_size),
        train_indices=problem.train_indices[:full],
    )


def resized(dataset: LesionDataset, image_size: int) -> LesionDataset:
    """The images at another size; for speed's sake from the nearest pixels."""
    if dataset.image_size == image_size:
        return dataset
    nearest = torch.arange(image_size) * dataset.image_size // image_size
    return LesionDataset(
        dataset.images[:, nearest][:, :, nearest],
        dataset.labels,
        image_ids=dataset.image_ids,
        lesion_ids=dataset.lesion_ids,
        source=dataset.source,
    )


def pytorch_name(layout: str, compiled: bool, fused: bool) -> str:
    """A mode in words."""
    return f"{'compiled' if compiled else 'eager'} {layout} {adam_name(fused)}"


def adam_name(fused: bool) -> str:
    """A torch.optim.Adam in words."""
    return "Adam(fused=True)" if fused else "Adam()"


def compare_update(problem: Problem, bench: Bench) -> Row:
    """What a step does with weights and gradients besides using them."""
    contenders = [Contender("skinfast", True, partial(Update, problem, True, False))]
    for fused in (False, True):
        build = partial(Update, problem, False, fused)
        contenders.append(Contender(adam_name(fused), False, build))
    name = f"update phase of {problem.config.model} {problem.config.precision}"
    (row,) = bench.compare(name, contenders, assert_same_updates)
    return row


def compare_step(problem: Problem, bench: Bench, fused: bool, modes: Modes) -> Row:
    """A whole training step."""
    return _compare(problem, bench, fused, modes, lambda build: build, STEP_SECONDS)


def compare_epoch(problem: Problem, bench: Bench, fused: bool, modes: Modes) -> Row:
    """A whole epoch."""
    return _compare(problem, bench, fused, modes, lambda build: partial(EpochOf, build), 0.0)


class EpochOf:
    """Called, it trains for an epoch."""

    def __init__(self, build: Callable[[], Trainer]) -> None:
        self.trainer = build()

    def __call__(self) -> None:
        self.trainer.epoch()


def _compare(
    problem: Problem,
    bench: Bench,
    fused: bool,
    modes: Modes,
    wrapped: Callable[[Callable[[], Trainer]], Callable[[], Any]],
    sample_seconds: float,
) -> Row:
    contenders = [Contender("skinfast", True, wrapped(partial(Skinfast, problem)))]
    for (layout, compiled), compile_mode in modes.items():
        build = wrapped(partial(PyTorch, problem, layout, compiled, fused, compile_mode))
        contenders.append(Contender(pytorch_name(layout, compiled, fused), False, build, compiled))

    def check(calls: dict[str, Any]) -> None:
        trainers = {name: getattr(call, "trainer", call) for name, call in calls.items()}
        assert_same_training(problem, tolerance(problem.config), trainers)

    config = problem.config
    name = f"{config.model} {config.image_size}x{config.image_size} {config.precision}"
    (row,) = bench.compare(name, contenders, check, sample_seconds)
    return row


class ModelsBench:
    """The tables of one run."""

    def __init__(self, options: Any, bench: Bench, report: Report) -> None:
        self.options, self.bench, self.report = options, bench, report
        self.models = options.model or list(MODELS)
        self.precisions = options.precision or list(PRECISIONS)
        self.fused: dict[tuple[str, str], bool] = {}  # PyTorch's better Adam
        self.best: dict[tuple[str, str], tuple[str, bool]] = {}  # its better mode at 64x64

    def updates(self) -> None:
        """Casts, Adam, gradient clearing; says which Adam PyTorch gets below."""
        self.report.header("update phase: casts of weights and gradients, Adam, clearing", "ms")
        for model, precision in itertools.product(self.models, self.precisions):
            problem = problem_for(self.options, model, IMAGE_SIZES[0], precision)
            row = compare_update(problem, self.bench)
            self.fused[model, precision] = row.mode == adam_name(True)
            self._add("update", problem, row)

    def steps(self) -> None:
        """Steps and epochs at both sizes in both precisions."""
        quick = self.options.quick
        eager = quick or self.options.eager
        modes = {m: self.options.compile_mode for m in MODES if not (eager and m[1])}
        batch = self.options.batch_size
        self.report.header("a training step, an epoch", "ms")
        for model in self.models:
            for image_size in IMAGE_SIZES[: 1 if quick else None]:
                for precision in self.precisions[: 1 if quick else None]:
                    problem = problem_for(self.options, model, image_size, precision, batch)
                    fused = self.fused[model, precision]
                    row = compare_step(problem, self.bench, fused, modes)
                    self._add("step", problem, row)
                    names = {pytorch_name(*mode, fused): mode for mode in modes}
                    ranked = [names[name] for name in sorted(row.modes, key=row.modes.__getitem__)]
                    best = ranked[0]
                    self.best.setdefault((model, precision), best)
                    # The memory compared with is that of a mode without a compiler.
                    lean = next(mode for mode in ranked if not mode[1])
                    steps = len(problem.train_batches())
                    short = row.ours.median * steps <= EPOCH_SECONDS
                    if short and not quick and not self.options.steps:
                        contenders = {mode: modes[mode] for mode in (best, lean)}
                        row = compare_epoch(problem, self.bench, fused, contenders)
                        self._add(f"epoch of {steps} steps", problem, row)

    def scaling(self) -> None:
        """One setting at a time changed from batch 64, all threads, 64x64."""
        self.report.header("scaling, against the best mode at 64x64", "ms")
        threads = torch.get_num_threads()
        for model, precision in itertools.product(self.models, self.precisions):
            best = self.best.get((model, precision))
            if best is None:
                continue
            for setting, settings in SCALING.items():
                if setting == "threads" and self.bench.device.type != "cpu":
                    continue
                for value in settings:
                    batch = value if setting == "batch" else 64
                    size = value if setting == "image" else 64
                    problem = problem_for(self.options, model, size, precision, batch)
                    torch.set_num_threads(value if setting == "threads" else threads)
                    modes = {best: self.options.compile_mode}
                    row = compare_step(problem, self.bench, self.fused[model, precision], modes)
                    self._add("step", problem, row)
        torch.set_num_threads(threads)

    def _add(self, what: str, problem: Problem, row: Row) -> None:
        config = problem.config
        facts = {
            "model": config.model,
            "images": f"{config.image_size}x{config.image_size}",
            "batch": config.batch_size,
            "threads": torch.get_num_threads(),
            "precision": config.precision,
            "timed": what,
        }
        self.report.add(facts, row, "ms")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", default="synthetic", help="a folder of HAM10000, or synthetic")
    arguments.add_argument("--model", action="append", choices=list(MODELS), help="default: all")
    arguments.add_argument("--precision", action="append", choices=PRECISIONS, help="default: all")
    arguments.add_argument("--batch-size", type=int, default=64, metavar="B", help="of the steps")
    arguments.add_argument("--eager", action="store_true", help="leave torch.compile out")
    arguments.add_argument("--steps", action="store_true", help="leave the epochs out")
    arguments.add_argument(
        "--compile-mode", default="max-autotune", help="torch.compile's on a GPU (%(default)s)"
    )
    arguments.add_argument("--scaling", action="store_true", help="add the scaling table")
    options = arguments.parse_args()
    bench = bench_of(options)
    columns = {"model": 21, "images": 9, "batch": 7, "threads": 9, "precision": 11, "timed": 22}
    report = Report("Training with skinfast against PyTorch", columns, bench, options)
    if bench.device.type == "cuda":
        report.note("skinfast's steps are not captured here; in bench_epoch.py they are")
    if bench.device.type == "cuda" and not options.eager:
        report.note(**{"compile mode": options.compile_mode})
    models = ModelsBench(options, bench, report)
    models.updates()
    models.steps()
    if options.scaling:
        models.scaling()
    report.finish()


if __name__ == "__main__":
    sys.exit(run(main))
