"""Print what `skinfast reproduce` measured as docs/reproduction.md shows it, and draw its pictures.

python bench/summarise_reproduction.py bench/results/reproduction.json
python bench/summarise_reproduction.py bench/results/reproduction*.json --figures docs/figures
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skinfast.experiments import reproduction_page
from skinfast.experiments.tables import METRIC_TITLES, MODEL_TITLES
from skinfast.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the paper's tables.
METRICS = ("accuracy", "f1_weighted", "precision_macro")
SERIES = {  # of a model, side by side: title, colour, marker
    ("paper", "image"): ("the paper's settings, split by image", "#c05621", "o"),
    ("best", "image"): ("good settings, split by image", "#2b6cb0", "o"),
    ("paper", "lesion"): ("the paper's settings, split by lesion", "#c05621", "^"),
    ("best", "lesion"): ("good settings, split by lesion", "#2b6cb0", "^"),
}

Cell = dict[str, Any]


def markdown(content: dict[str, Any]) -> str:
    """The tables, their headings a level lower: below one of the page's own."""
    lines = reproduction_page.markdown(content).splitlines()
    return "\n".join("#" + line if line.startswith("#") else line for line in lines)


def draw_cells(cells: Sequence[Cell]) -> Figure:
    """Every figure with its interval, and the paper's; a row for each image size."""
    sizes = sorted({cell["image_size"] for cell in cells}, reverse=True)
    models = [model for model in MODEL_TITLES if any(cell["model"] == model for cell in cells)]
    figure = new_figure(11, 3.6 * len(sizes) + 0.6)
    grid = figure.subplots(len(sizes), len(METRICS), squeeze=False)
    for row, size in zip(grid, sizes, strict=True):
        for axes, metric in zip(row, METRICS, strict=True):
            for x, model in enumerate(models):
                own = [c for c in cells if (c["image_size"], c["model"]) == (size, model)]
                draw_model(axes, x, [cell for cell in own if cell["metrics"]], metric)
            axes.set_title(f"{METRIC_TITLES[metric]}, {size}x{size}")
            axes.set_xticks(range(len(models)), [MODEL_TITLES[model] for model in models])
            axes.set_xlim(-0.5, len(models) - 0.5)
            axes.grid(axis="y", color="#dddddd")
            axes.set_axisbelow(True)
    names = dict(
        zip(*reversed(grid[0][0].get_legend_handles_labels()), strict=True)
    )  # each title once
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_model(axes: Axes, x: int, cells: Sequence[Cell], metric: str) -> None:
    """A model's figures, around x, and the paper's as a line through them."""
    for i, (key, (title, colour, marker)) in enumerate(SERIES.items()):
        for cell in cells:
            if (cell["preset"], cell["split"]) == key:
                estimate = cell["metrics"][metric]
                value = estimate["value"]
                spread = [[value - estimate["low"]], [estimate["high"] - value]]
                style: dict[str, Any] = {
                    "color": colour,
                    "marker": marker,
                    "linestyle": "",
                    "capsize": 2,
                }
                axes.errorbar(x + 0.18 * (i - 1.5), value, spread, label=title, **style)
    for paper in [cell["paper"][metric] for cell in cells if cell["paper"]][:1]:
        axes.hlines(paper, x - 0.42, x + 0.42, color="black", linestyle="--", label="the paper")


def draw_classes(counts: dict[str, int]) -> Figure:
    """How many images each class has."""
    figure = new_figure(7, 3)
    axes = figure.add_subplot()
    bars = axes.bar(list(counts), list(counts.values()), color="#2b6cb0")
    axes.bar_label(bars, [f"{count:,}" for count in counts.values()])
    axes.set_ylabel("images")
    axes.margins(y=0.1)
    return figure


def draw_confusion(cells: Sequence[Cell], classes: Sequence[str]) -> Figure:
    """Of the good settings on the paper's split; the rows of a matrix add up to 1."""
    cells = [
        cell
        for cell in cells
        if (cell["preset"], cell["split"]) == ("best", "image") and cell["confusion_matrix"]
    ]
    sizes = sorted({cell["image_size"] for cell in cells}, reverse=True)
    models = [model for model in MODEL_TITLES if any(cell["model"] == model for cell in cells)]
    figure = new_figure(3.7 * len(models), 3.9 * len(sizes))
    grid = figure.subplots(len(sizes), len(models), squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for cell in cells:
        axes = grid[sizes.index(cell["image_size"]), models.index(cell["model"])]
        axes.set_axis_on()
        counts = np.array(cell["confusion_matrix"])
        shares = counts / counts.sum(1, keepdims=True)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (i, j), share in np.ndenumerate(shares):
            colour = "white" if share > 0.5 else "black"
            axes.text(j, i, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=7)
        size = cell["image_size"]
        axes.set_title(f"{MODEL_TITLES[cell['model']]}, {size}x{size}")
        axes.set_xticks(range(len(classes)), classes)
        axes.set_yticks(range(len(classes)), classes)
        axes.set(xlabel="predicted", ylabel="true")
    return figure


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def write(figure: Figure, path: Path) -> None:
    """Write it as SVG; equal figures give equal bytes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with matplotlib.rc_context({"svg.hashsalt": "skinfast"}), atomic_path(path) as temporary:
        FigureCanvasSVG(figure).print_svg(str(temporary), metadata={"Date": None})
    print(f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="files that reproduce wrote")
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="draw there: of all files, first come, first drawn",
    )
    options = parser.parse_args()
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    if options.figures is None:
        print("\n\n".join(markdown(content) for content in contents))
        return
    options.figures.mkdir(parents=True, exist_ok=True)
    places: dict[Any, Cell] = {}
    for cell in (cell for content in contents for cell in content["cells"]):
        place = tuple(cell[key] for key in ("preset", "split", "image_size", "model"))
        places.setdefault(place, cell)
    cells = list(places.values())
    counts = contents[0]["class_counts"]
    write(draw_cells(cells), options.figures / "reproduction_cells.svg")
    write(draw_classes(counts), options.figures / "reproduction_classes.svg")
    write(draw_confusion(cells, list(counts)), options.figures / "reproduction_confusion.svg")


if __name__ == "__main__":
    main()
