"""The same trainings by skinfast's ops and by pure PyTorch: accuracies over several seeds.

python bench/bench_accuracy.py --data data/ham10000 --output bench/results/accuracy.json
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import commit, run

from skinfast.environment import environment
from skinfast.evaluation import write_result
from skinfast.files import atomic_write_text
from skinfast.training import TrainConfig, prepare, train
from skinfast.training.config import PRECISIONS

SETTINGS = (
    TrainConfig(model="cnn", image_size=64, epochs=10),
    TrainConfig(model="cnn", image_size=32, epochs=10),
    TrainConfig(model="logistic-regression", image_size=64, epochs=5),
    TrainConfig(model="logistic-regression", image_size=32, epochs=5),
    TrainConfig(model="resnet50", image_size=32, epochs=2),
)
BACKENDS = ("skinfast", "torch")
FIGURES = ("accuracy", "balanced_accuracy")


def train_once(config: TrainConfig) -> dict[str, Any]:
    """Test-set figures of one training."""
    problem = prepare(config)
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", problem=problem)
        result = write_result(Path(folder) / "run", problem)
    return {name: result[name] for name in FIGURES}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", default="synthetic", help="a folder of HAM10000, or synthetic")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options.add_argument("--seeds", type=int, default=3, metavar="N")
    options.add_argument("--model", action="append", help="default: all")
    options.add_argument("--precision", action="append", choices=PRECISIONS, help="default: both")
    options.add_argument("--output", metavar="FILE", type=Path, help="write JSON")
    given = options.parse_args()
    rows = []
    print(
        f"{'model':<21}{'images':<9}{'epochs':<8}{'precision':<11}{'backend':<10}accuracy by seed"
    )
    for setting, precision in itertools.product(SETTINGS, given.precision or PRECISIONS):
        if given.model and setting.model not in given.model:
            continue
        config = dataclasses.replace(
            setting, precision=precision, data=given.data, device=given.device
        )
        for backend in BACKENDS:
            seeds = range(given.seeds)
            results = [
                train_once(dataclasses.replace(config, backend=backend, seed=s)) for s in seeds
            ]
            accuracies = [result["accuracy"] for result in results]
            row = {
                "model": config.model,
                "image_size": config.image_size,
                "epochs": config.epochs,
                "precision": config.precision,
                "backend": backend,
                **{name: [result[name] for result in results] for name in FIGURES},
                "mean_accuracy": statistics.mean(accuracies),
            }
            rows.append(row)
            size = f"{config.image_size}x{config.image_size}"
            print(
                f"{config.model:<21}{size:<9}{config.epochs:<8}{config.precision:<11}{backend:<10}"
                f"{' '.join(f'{value:.4f}' for value in accuracies)}  "
                f"mean {row['mean_accuracy']:.4f}",
                flush=True,
            )
    if given.output:
        device = prepare(dataclasses.replace(SETTINGS[0], device=given.device)).device
        result = {"commit": commit(), "environment": environment(device), "rows": rows}
        result["data"] = Path(given.data).name
        atomic_write_text(given.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
