"""Print a result file of bench_models.py as the table that docs/performance.md shows.

python bench/summarise_bench.py bench/results/cpu_models.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TITLES = {"resnet50": "ResNet-50", "cnn": "CNN", "logistic-regression": "logistic regression"}


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown. On a CPU, ratios only: its times hold for that machine alone."""
    lines = [
        "| model | images | batch, threads | precision | timed | times as fast (range) | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["ratio_range"]
        memory = row["ours_memory"] / row["pytorch_memory"] if row["pytorch_memory"] else None
        lines.append(
            f"| {TITLES[row['model']]} | {row['images']} | {row['batch']}, {row['threads']} | "
            f"{row['precision']} | {row['timed']} | {row['ratio']:.2f} ({low:.2f}-{high:.2f}) | "
            f"{'' if memory is None else f'{memory:.2f}'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="a file that bench_models.py wrote")
    print(table(json.loads(parser.parse_args().result.read_text())))


if __name__ == "__main__":
    main()
