"""The report's part on probabilities: what the run folder says of them, drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skinfast.errors import SkinfastError
from skinfast.report.plots import INK, TEST, TRAIN, svg_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What the interval of a calibration error is worth: docs/analysis.md has the simulation.
INTERVAL_COVERAGE = (
    "in a simulation the interval, nominally 95%, held the true error of calibrated models in 56% "
    "of cases, an error of 0.05 in 89% and one of 0.15 in 92%"
)

_FIGURES = (
    "num_images",
    "loss",
    "accuracy",
    "mean_confidence",
    "expected_calibration_error",
    "interval",
    "expected_if_calibrated",
    "bins",
    "risk_coverage",
)
_BIN = ("confidence", "accuracy", "count")
_ROW = ("coverage", "threshold", "accuracy", "balanced_accuracy", "answered")
_FITTED = ("temperature", "num_fitted", "num_measured", "grouped_by_lesion", "before", "after")


@dataclass(frozen=True)
class Calibration:
    """Figures of ``skinfast.evaluation.calibration_figures``.

    Attributes:
        trained: of all test images, as the model is.
        fitted: the content of calibration.json, whose ``before`` and ``after`` are such figures of
            the half that did not fit the temperature; None where there is none for these weights.
    """

    trained: dict[str, Any]
    fitted: dict[str, Any] | None

    @property
    def shown(self) -> dict[str, Any]:
        """The figures of the probabilities that `skinfast predict` gives."""
        return self.trained if self.fitted is None else self.fitted["after"]


def read_calibration(directory: Path, result: dict[str, Any]) -> Calibration | None:
    """What a run says of its probabilities; None for a run of before that was measured.

    Raises:
        SkinfastError: result.json or calibration.json lacks a figure.
    """
    if "calibration" not in result:
        return None
    _require(result["calibration"], directory / "result.json", "skinfast train --resume")
    fitted = None
    path = directory / "calibration.json"
    if path.exists():
        # Imports torch, which a run without a temperature need not wait for.
        from skinfast.evaluation import temperature

        fitted = temperature.read_calibration(directory)
    if fitted is not None:
        mend = "skinfast calibrate"
        if not all(key in fitted for key in _FITTED):
            raise SkinfastError(f"{path} lacks figures; run `{mend}` again")
        _require(fitted["before"], path, mend)
        _require(fitted["after"], path, mend)
    return Calibration(result["calibration"], fitted)


def _require(figures: Any, path: Path, mend: str) -> None:
    whole = (
        isinstance(figures, dict)
        and all(key in figures for key in _FIGURES)
        and len(figures["bins"]) > 0
        and len(figures["risk_coverage"]) > 0
        and all(key in entry for entry in figures["bins"] for key in _BIN)
        and all(key in row for row in figures["risk_coverage"] for key in _ROW)
    )
    if not whole:
        raise SkinfastError(f"{path} lacks figures of the calibration; run `{mend}` again")


def calibration_drawings(calibration: Calibration | None) -> dict[str, Any]:
    """The template's ``reliability_svg`` and ``abstention_svg``, and what it says of intervals."""
    if calibration is None:
        return {}
    from markupsafe import Markup

    if calibration.fitted is None:
        series = {"as trained": calibration.trained}
    else:
        series = {
            "as trained": calibration.fitted["before"],
            "with temperature": calibration.fitted["after"],
        }
    return {
        "interval_coverage": INTERVAL_COVERAGE,
        "reliability_svg": Markup(reliability_diagram(series)),
        "abstention_svg": Markup(abstention_curve(calibration.shown["risk_coverage"])),
    }


def reliability_diagram(series: dict[str, dict[str, Any]]) -> str:
    """Draw accuracy by confidence, the size of a point being its share of the images.

    Args:
        series: one or two names with the figures of ``calibration_figures``.

    Returns:
        As ``plots.loss_curves``.
    """
    styles: list[dict[str, Any]] = [
        {"color": TRAIN, "linestyle": "--", "marker": "s"},
        {"color": TEST, "linestyle": "-", "marker": "o"},
    ]

    def draw(figure: Figure) -> str:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=INK, linestyle=":", label="calibrated")
        said = []
        for (name, figures), style in zip(series.items(), styles[-len(series) :], strict=True):
            confidence = [entry["confidence"] for entry in figures["bins"]]
            accuracy = [entry["accuracy"] for entry in figures["bins"]]
            counts = [entry["count"] for entry in figures["bins"]]
            marker = style["marker"]
            axes.plot(confidence, accuracy, label=name, **{**style, "markersize": 4})
            areas = [12 + 260 * count / sum(counts) for count in counts]
            axes.scatter(confidence, accuracy, areas, color=style["color"], marker=marker)
            error = figures["expected_calibration_error"]
            said.append(f"{name} the calibration error is {error:.3f}")
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3)
        return f"Accuracy by confidence beside the line of equality: {'; '.join(said)}."

    return svg_of(draw, "reliability")


def abstention_curve(rows: list[dict[str, Any]]) -> str:
    """Draw accuracy and balanced accuracy by the share of images that get an answer.

    Args:
        rows: of ``risk_coverage``.

    Returns:
        As ``plots.loss_curves``.
    """

    def draw(figure: Figure) -> str:
        from matplotlib.ticker import PercentFormatter

        axes = figure.add_subplot()
        for key, name, colour, line, marker in (
            ("accuracy", "accuracy", TEST, "-", "o"),
            ("balanced_accuracy", "balanced accuracy", TRAIN, "--", "s"),
        ):
            known = [(row["coverage"], row[key]) for row in rows if row[key] is not None]
            coverage, values = zip(*known, strict=True) if known else ((), ())
            axes.plot(coverage, values, color=colour, linestyle=line, marker=marker, label=name)
        axes.set(xlim=(1.02, 0), ylim=(0, 1.02), xlabel="images answered, the surest first")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3)
        ends = [
            f"{row['coverage']:.0%} answered, accuracy {row['accuracy']:.3f}"
            for row in (rows[0], rows[-1])
        ]
        return f"Accuracy by the share of images answered: from {' to '.join(ends)}."

    return svg_of(draw, "abstention")
