"""Pictures of Grad-CAM, and a page of them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from skinfast.data.classes import CLASS_NAMES
from skinfast.files import atomic_path, atomic_write_text
from skinfast.report.html import page

if TYPE_CHECKING:
    from skinfast.evaluation.explain import Explanation

_SIDE = 256
# How much of the hottest place is covered; a place without heat shows the photograph itself.
_OPACITY = 0.65


def write_explanations(
    explanations: Sequence[Explanation], directory: str | os.PathLike[str]
) -> Path:
    """Leave a PNG for each image, ``explain.json`` and ``explain.html`` in a folder.

    The PNGs, ``001-NAME.png`` and so on, are 512x256: the photograph as the model sees it, and
    beside it the same under its heat.

    Returns:
        The path of the page.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    shown = [(one, enlarged(one.pixels), overlay(one.pixels, one.heat)) for one in explanations]
    entries = []
    for number, (one, photograph, heated) in enumerate(shown, start=1):
        name = f"{number:03}-{Path(one.image).stem}.png"
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(_png(np.concatenate([photograph, heated], axis=1)))
        entries.append(
            {
                "image": one.image,
                "picture": name,
                "class": one.class_name,
                "probability": one.probability,
                "predicted": one.predicted,
                "layer": one.layer,
                "heat": one.heat.tolist(),
            }
        )
    atomic_write_text(folder / "explain.json", json.dumps(entries, indent=2) + "\n")
    html = page(
        "explain.html.j2",
        shown=shown,
        place=place,
        full_name=lambda name: CLASS_NAMES.get(name, name),
    )
    path = folder / "explain.html"
    atomic_write_text(path, html.encode("utf-8", "replace").decode("utf-8"))
    return path


def enlarged(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A picture at 256x256."""
    from PIL import Image

    size = (_SIDE, _SIDE)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def overlay(pixels: npt.NDArray[np.uint8], heat: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """A picture at 256x256 under its heat, 0 to 1: dark violet is little, yellow is most."""
    from matplotlib import colormaps
    from PIL import Image

    size = (_SIDE, _SIDE)
    smooth = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR))
    smooth = smooth.clip(0, 1)[..., None]
    colours = colormaps["inferno"](smooth[..., 0])[..., :3] * 255
    share = _OPACITY * smooth
    blended = enlarged(pixels) * (1 - share) + colours * share
    return np.asarray(blended.round().astype(np.uint8))


def place(heat: npt.NDArray[np.float32]) -> str:
    """Where the heat is greatest, in words: for those who do not see the picture."""
    if heat.max() <= 0:
        return "nowhere"
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    names = []
    for position, length, few in (
        (row, heat.shape[0], ("upper", "middle", "lower")),
        (column, heat.shape[1], ("left", "middle", "right")),
    ):
        names.append(few[min(2, int(3 * (position + 0.5) / length))])
    return "in the middle" if names == ["middle", "middle"] else f"at the {' '.join(names)}"


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
