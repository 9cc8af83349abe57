"""Print a result file of bench_models.py or bench_accuracy.py as docs/performance.md shows it.

python bench/summarise_bench.py bench/results/cpu_models.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from skinfast.experiments.tables import MODEL_TITLES


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    is_accuracy = "mean_accuracy" in result["rows"][0]
    return accuracy_table(result) if is_accuracy else time_table(result)


def time_table(result: dict[str, Any]) -> str:
    """Of bench_models.py. On a CPU, ratios only: its times hold for that machine alone."""
    lines = [
        "| model | images | batch, threads | precision | timed | times as fast (range) | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["ratio_range"]
        memory = row["ours_memory"] / row["pytorch_memory"] if row["pytorch_memory"] else None
        lines.append(
            f"| {MODEL_TITLES[row['model']]} | {row['images']} | {row['batch']}, "
            f"{row['threads']} | {row['precision']} | {row['timed']} | "
            f"{row['ratio']:.2f} ({low:.2f}-{high:.2f}) | "
            f"{'' if memory is None else f'{memory:.2f}'} |"
        )
    return "\n".join(lines)


def accuracy_table(result: dict[str, Any]) -> str:
    """Of bench_accuracy.py: means over seeds, ranges, and the mean difference of equal seeds."""
    settings: dict[tuple[str, int, int, str], dict[str, list[float]]] = {}
    for row in result["rows"]:
        setting = row["model"], row["image_size"], row["epochs"], row["precision"]
        settings.setdefault(setting, {})[row["backend"]] = row["accuracy"]
    lines = [
        "| model | images | epochs | precision | skinfast (range) | PyTorch (range) "
        "| difference (standard error) |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, size, epochs, precision), accuracies in settings.items():
        ours, theirs = accuracies["skinfast"], accuracies["torch"]
        means = [f"{statistics.mean(a):.4f} ({min(a):.4f}-{max(a):.4f})" for a in (ours, theirs)]
        pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
        error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
        lines.append(
            f"| {MODEL_TITLES[model]} | {size}x{size} | {epochs} | {precision} | "
            f"{' | '.join(means)} | {statistics.mean(pairs):+.4f} ({error:.4f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="a file that one of the two wrote")
    print(table(json.loads(parser.parse_args().result.read_text())))


if __name__ == "__main__":
    main()
