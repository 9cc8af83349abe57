"""``audit.json`` and ``audit.html``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from skinfast.audit.audit import Audit
from skinfast.data.classes import CLASS_NAMES
from skinfast.files import atomic_write_text
from skinfast.report.html import page

# Of pictures: more would make a page that no mail takes; audit.json lists all pairs.
_PAIRS_SHOWN = 60


def write_audit(audit: Audit, directory: str | os.PathLike[str]) -> Path:
    """Leave ``audit.json`` and ``audit.html``, one file with its pictures inside, in a folder.

    Returns:
        The path of the page.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder = Path(directory)
    html = render(audit)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "audit.json", json.dumps(audit.findings, indent=2) + "\n")
    path = folder / "audit.html"
    # A path that is not UTF-8 becomes lone surrogates, which no file can hold.
    atomic_write_text(path, html.encode("utf-8", "replace").decode("utf-8"))
    return path


def render(audit: Audit) -> str:
    """The findings as an HTML page."""
    images = audit.dataset.images.numpy()
    shown = []
    for found, pair in zip(audit.findings["pairs"], audit.pairs, strict=True):
        matters = (
            found["conflict"],
            found["across_split"],
            found["same_lesion"] is False,
            found["identical"],
        )
        shown.append((matters, found, (images[pair.first], images[pair.second])))
    shown.sort(key=lambda entry: entry[0], reverse=True)
    return page(
        "audit.html.j2",
        findings=audit.findings,
        summary=audit.findings["summary"],
        pairs=[(found, pictures) for _, found, pictures in shown[:_PAIRS_SHOWN]],
        orientation=orientation,
        full_name=lambda name: CLASS_NAMES.get(name, name),
    )


def orientation(pair: dict[str, Any]) -> str:
    """How the first image of a pair has to be turned to show the second, in words; or nothing."""
    turned = f"turned by {90 * pair['turned']}°" if pair["turned"] else ""
    mirrored = "mirrored" if pair["mirrored"] else ""
    return " and ".join(filter(None, [mirrored, turned]))
