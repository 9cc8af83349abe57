"""Renders a run folder as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skinfast.data.classes import CLASS_NAMES
from skinfast.files import atomic_write_text
from skinfast.report import plots
from skinfast.report.calibration import calibration_drawings
from skinfast.report.run_folder import Run, read_run


def write_report(run_directory: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run folder, from what lies in that folder alone.

    The page is one file without scripts or outside resources. Equal run folders give equal bytes.
    A report that stood there before is replaced whole or, if anything fails, left as it was.

    Args:
        run_directory: holds ``config.json``, ``metrics.jsonl``, ``result.json`` and
            ``predictions.npz``.

    Returns:
        The path of the report.

    Raises:
        SkinfastError: a file is missing, cut off or lacks a key; the line names the file.
        OSError: the folder cannot be written, or the disk is full.
    """
    page = render(read_run(run_directory))
    path = Path(run_directory) / "report.html"
    # A path that is not UTF-8 reaches config.json as lone surrogates, which no file can hold.
    atomic_write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


def render(run: Run) -> str:
    """Return the report as an HTML page."""
    # Only a run that could be read is worth the wait for this import.
    from markupsafe import Markup

    result = run.result
    return page(
        "report.html.j2",
        config=run.config,
        result=result,
        data=result["data"],
        samples=run.samples,
        full_name=lambda name: CLASS_NAMES.get(name, name),
        majority=max(result["per_class"], key=lambda entry: entry["support"])["name"],
        weakest=min(
            (entry for entry in result["per_class"] if entry["support"]),
            key=lambda entry: entry["recall"],
        ),
        confusion=_confusion_rows(result["confusion_matrix"]),
        speed=_median_speed(run.epochs),
        loss_svg=Markup(plots.loss_curves(run.epochs)),
        accuracy_svg=Markup(plots.accuracy_curves(run.epochs, result["majority_accuracy"])),
        calibration=run.calibration,
        **calibration_drawings(run.calibration),
    )


def page(template: str, **values: Any) -> str:
    """Fill a template of this package, which gives every page one style, with escaped values."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = importlib.resources.files("skinfast.report")
    environment = Environment(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        figure=_figure, duration=duration, percent=_percent, setting=_setting, png_uri=_png_uri
    )
    return environment.get_template(template).render(values)


def _confusion_rows(matrix: list[list[int]]) -> list[list[tuple[int, float, str]]]:
    """Give each count its share of the row and that share in words."""
    rows = []
    for counts in matrix:
        total = sum(counts)
        shares = [count / total if total else 0.0 for count in counts]
        rows.append([(n, share, _percent(share)) for n, share in zip(counts, shares, strict=True)])
    return rows


def _median_speed(epochs: list[dict[str, Any]]) -> float | None:
    # The median, because the first epoch also pays for warming up.
    speeds = [epoch["images_per_second"] for epoch in epochs]
    known = [speed for speed in speeds if speed is not None and math.isfinite(speed)]
    return statistics.median(known) if known else None


def _percent(share: float) -> str:
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def _figure(value: float | None) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _png_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Encode uint8 ``[H, W, 3]`` as a ``data:`` URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
