"""Training curves as inline SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib knows no CSS: it draws in these colours, and the SVG text gets the page's instead, so
# that one picture reads well on light, on dark and on paper.
INK, RULE, TRAIN, TEST = "#000001", "#000002", "#000003", "#000004"
_CSS_COLOURS = {
    INK: "currentColor",
    RULE: "var(--rule)",
    TRAIN: "var(--train)",
    TEST: "var(--test)",
}

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "skinfast",  # ids by content: the same run gives the same bytes
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 11,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.borderaxespad": 0,
    "legend.borderpad": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.major.size": 0,
}

_NO_METADATA = dict.fromkeys(["Date", "Creator", "Format", "Type"])


def loss_curves(epochs: Sequence[dict[str, Any]]) -> str:
    """Draw ``train_loss`` and ``test_loss`` by ``epoch``.

    Returns:
        An ``<svg>`` element to put inside an HTML page that defines the CSS variables ``--rule``,
        ``--train`` and ``--test``. Equal input gives equal bytes.
    """
    return _curves(epochs, "loss", "Cross-entropy loss", majority=None)


def accuracy_curves(epochs: Sequence[dict[str, Any]], majority: float) -> str:
    """Draw ``train_accuracy`` and ``test_accuracy`` by ``epoch`` above a dotted majority line.

    Args:
        epochs: the lines of ``metrics.jsonl``.
        majority: accuracy of always answering the commonest class, in 0 to 1.

    Returns:
        As ``loss_curves``.
    """
    return _curves(epochs, "accuracy", "Accuracy", majority)


def _curves(
    epochs: Sequence[dict[str, Any]], quantity: str, title: str, majority: float | None
) -> str:
    def draw(figure: Figure) -> str:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        ends = [
            _draw(axes, epochs, f"train_{quantity}", "train", color=TRAIN, linestyle="--"),
            _draw(axes, epochs, f"test_{quantity}", "test", color=TEST, linestyle="-"),
        ]
        if majority is not None:
            axes.axhline(majority, color=INK, linestyle=":", label=f"majority class {majority:.3f}")
            ends.append(f"always answering the majority class gives {majority:.3f}")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        # Above the axes, where no curve can run through it.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3)
        return f"{title} by epoch: {'; '.join(ends)}."

    return svg_of(draw, quantity)


def svg_of(draw: Callable[[Figure], str], name: str, size: tuple[float, float] = (5.6, 3.5)) -> str:
    """Let ``draw`` fill a figure of ``size`` inches and say in words what it shows.

    It draws in ``INK``, ``RULE``, ``TRAIN`` and ``TEST``, which the page gives their colours.

    Returns:
        As ``loss_curves``; ``name`` sets its ids apart from those of the page's other drawings.
    """
    # matplotlib takes a second to import.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # rcdefaults first: a user's own matplotlibrc must not change the report.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=size, layout="constrained")
        description = draw(figure)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata=_NO_METADATA)
    return _for_html(buffer.getvalue(), name, description)


def _draw(axes: Axes, epochs: Sequence[dict[str, Any]], key: str, label: str, **style: Any) -> str:
    """Draw one curve through the finite values; say in words where it ends."""
    points = [
        (epoch["epoch"], epoch[key])
        for epoch in epochs
        if epoch[key] is not None and math.isfinite(epoch[key])
    ]
    x, y = zip(*points, strict=True) if points else ((), ())
    # A line through one point is invisible.
    axes.plot(x, y, label=label, marker="o" if len(points) == 1 else None, **style)
    return f"{label} ends at {y[-1]:.3f}" if points else f"{label} has no finite value"


def _for_html(svg: str, name: str, description: str) -> str:
    """Make matplotlib's SVG document an element of an HTML page that holds several of them."""
    svg = svg[svg.index("<svg") :]
    for drawn, css in _CSS_COLOURS.items():
        svg = svg.replace(drawn, css)
    # Every figure calls its parts the same, and an id may stand only once in a page.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    # Inside a page this rule would apply to the page.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
