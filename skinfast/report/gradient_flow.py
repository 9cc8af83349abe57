"""``gradient_flow.json``, a drawing and a page of what `skinfast gradient-flow` measured."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skinfast.files import atomic_write_text
from skinfast.report.html import page
from skinfast.report.plots import INK, TEST, TRAIN, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMES = {
    "resnet50": "ResNet-50",
    "resnet50-without-skips": "without skips",
    "cnn": "CNN",
}
_STYLES: dict[str, dict[str, Any]] = {
    "resnet50": {"color": TEST, "linestyle": "-", "marker": "o"},
    "resnet50-without-skips": {"color": TRAIN, "linestyle": "--", "marker": "s"},
    "cnn": {"color": INK, "linestyle": ":", "marker": "^"},
}
# Of a drawing that stands alone, where no page gives it colours: those of a light page.
_LIGHT = {
    "currentColor": "#1b1f24",
    "var(--rule)": "#d8dde2",
    "var(--train)": "#b3600c",
    "var(--test)": "#1f5fa8",
}
_Points = list[tuple[float, float]]


def write_gradient_flow(result: dict[str, Any], directory: str | os.PathLike[str]) -> Path:
    """Leave ``gradient_flow.json``, ``gradient_flow.svg`` and ``gradient_flow.html`` in a folder.

    A number that is not finite is null in the JSON, which has no other word for it, and is left out
    of the drawings.

    Args:
        result: of ``skinfast.evaluation.gradient_flow.gradient_flow``.

    Returns:
        The path of the page.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder = Path(directory)
    drawing, html = standalone(flow_drawing(result)), render(result)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "gradient_flow.json", json.dumps(_finite(result), indent=2) + "\n")
    atomic_write_text(folder / "gradient_flow.svg", drawing)
    path = folder / "gradient_flow.html"
    atomic_write_text(path, html.encode("utf-8", "replace").decode("utf-8"))
    return path


def summary(network: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each measurement of a network: what the tables of terminal and page show.

    ``ratio`` is the gradient at the first layer over that at the last before the output.
    """
    lines = []
    for measured in network["measurements"]:
        stream, layers = measured["stream"], measured["layers"]
        first, last = stream[0]["gradient"], stream[-2]["gradient"]
        lines.append(
            {
                "epoch": measured["epoch"],
                "loss": measured["loss"],
                "accuracy": measured["accuracy"],
                "first": first,
                "last": last,
                "ratio": first / last if last else None,
                "dead_units": statistics.mean(r["dead_units"] for r in measured["relus"]),
                "most_dead": max(r["dead_units"] for r in measured["relus"]),
                "update_ratio": statistics.median(entry["update_ratio"] for entry in layers),
            }
        )
    return lines


def render(result: dict[str, Any]) -> str:
    """The measurements as an HTML page."""
    from markupsafe import Markup

    return page(
        "gradient_flow.html.j2",
        networks=[
            {
                "name": _NAMES[network["name"]],
                "layers": network["num_layers"],
                "diverged_in_epoch": network["diverged_in_epoch"],
                "lines": lines,
            }
            for network in result["networks"]
            for lines in [summary(network)]
        ],
        config=result["config"],
        probe_images=result["probe_images"],
        train_images=result["train_images"],
        last=_last_epoch(result),
        before_svg=Markup(_panel_svg(result, 0, "before")),
        after_svg=Markup(_panel_svg(result, -1, "after")),
        dead_svg=Markup(
            _depth_svg(result, "dead", "share of units that are always 0", _dead, log=False)
        ),
        update_svg=Markup(_depth_svg(result, "update", "step norm over weight norm", _updates)),
        times=_times,
        scientific=lambda value: f"{value:.1e}",
    )


def flow_drawing(result: dict[str, Any]) -> str:
    """The gradient by depth before training and after the last epoch, side by side on one scale.

    Returns:
        As ``plots.loss_curves``.
    """

    def draw(figure: Figure) -> str:
        left, right = figure.subplots(1, 2, sharey=True)
        said = [_panel(left, result, 0, "before training: "), _panel(right, result, -1, "")]
        epoch = _last_epoch(result)
        left.set_title("before training", loc="left", fontsize=11)
        right.set_title(f"after {epoch} {'epoch' if epoch == 1 else 'epochs'}", loc="left",
                        fontsize=11)  # fmt: skip
        right.set_ylabel("")
        left.legend(loc="best")
        return " ".join(said)

    return svg_of(draw, "flow", (10.5, 4.2))


def standalone(svg: str) -> str:
    """A drawing of ``svg_of`` as a file of its own: on white, in the colours of a light page."""
    for css, colour in _LIGHT.items():
        svg = svg.replace(css, colour)
    start = svg.index(">", svg.index("<svg")) + 1
    return f'{svg[:start]}\n <rect width="100%" height="100%" fill="#ffffff"/>{svg[start:]}'


def _panel_svg(result: dict[str, Any], which: int, name: str) -> str:
    def draw(figure: Figure) -> str:
        axes = figure.add_subplot()
        said = _panel(axes, result, which, "")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3)
        axes.set_ylim(*_limits(result))
        return said

    return svg_of(draw, name)


def _limits(result: dict[str, Any]) -> tuple[float, float]:
    """One scale for all panels, so that they can be compared."""
    values = [
        gradient
        for network in result["networks"]
        for measured in (network["measurements"][0], network["measurements"][-1])
        for _, gradient in _gradients(measured)
    ]
    return min(values, default=0.1) / 2, max(values, default=10.0) * 2


def _panel(axes: Axes, result: dict[str, Any], which: int, when: str) -> str:
    """Draw the gradient by depth of one measurement of every network; say it in words."""
    said = _lines(axes, result, which, _gradients)
    axes.set_yscale("log")
    axes.set(xlabel="layer, 1 being next to the image", ylabel="gradient norm at that layer")
    return f"{when}Norm of the gradient by layer: {said}."


def _gradients(measured: dict[str, Any]) -> _Points:
    return [
        (point["depth"], point["gradient"])
        for point in measured["stream"]
        if 0 < point["gradient"] < math.inf
    ]


def _dead(measured: dict[str, Any]) -> _Points:
    return [(relu["depth"], relu["dead_units"]) for relu in measured["relus"]]


def _updates(measured: dict[str, Any]) -> _Points:
    return [
        (layer["depth"], layer["update_ratio"])
        for layer in measured["layers"]
        if not layer["shortcut"] and 0 < layer["update_ratio"] < math.inf
    ]


def _depth_svg(
    result: dict[str, Any],
    name: str,
    label: str,
    points: Callable[[dict[str, Any]], _Points],
    log: bool = True,
) -> str:
    """Draw a quantity by depth, after the last epoch."""

    def draw(figure: Figure) -> str:
        axes = figure.add_subplot()
        said = _lines(axes, result, -1, points)
        axes.set(xlabel="layer, 1 being next to the image", ylabel=label)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(-0.02, 1.02)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3)
        return f"{label[0].upper()}{label[1:]}, by layer: {said}."

    return svg_of(draw, name)


def _lines(
    axes: Axes,
    result: dict[str, Any],
    which: int,
    points: Callable[[dict[str, Any]], _Points],
) -> str:
    said = []
    for network in result["networks"]:
        name = _NAMES[network["name"]]
        measured = network["measurements"][which]
        if which == -1 and measured["epoch"] < _last_epoch(result):
            name += f" (epoch {measured['epoch']})"
        found = points(measured)
        depth, values = zip(*found, strict=True) if found else ((), ())
        style = _STYLES[network["name"]]
        axes.plot(depth, values, label=name, **{**style, "markersize": 4})
        if found:
            said.append(f"{name} {values[0]:.2g} at the first and {values[-1]:.2g} at the last")
    return "; ".join(said)


def _last_epoch(result: dict[str, Any]) -> int:
    """The last that was measured of any network; one that diverged has fewer."""
    return max(network["measurements"][-1]["epoch"] for network in result["networks"])


def _finite(value: Any) -> Any:
    """JSON's value with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _times(ratio: float | None) -> str:
    if ratio is None or not math.isfinite(ratio):
        return "n/a"
    return (f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}") + "\N{MULTIPLICATION SIGN}"
