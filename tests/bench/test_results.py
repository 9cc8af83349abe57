"""The docs show what the committed result files hold."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "figures"
# Who prints the tables of a page: module and function.
PRINTERS = {
    "performance.md": ("summarise_bench", "table"),
    "reproduction.md": ("summarise_reproduction", "markdown"),
}
SHOWN = [
    (page, name, shown)
    for page in PRINTERS
    for name, shown in re.findall(
        r"<!-- (\S+\.json) -->\n(.*?)\n<!-- end -->",
        (ROOT / "docs" / page).read_text(encoding="utf-8"),
        re.DOTALL,
    )
]


def test_every_page_shows_a_table():
    assert {page for page, _, _ in SHOWN} == set(PRINTERS)


@pytest.mark.parametrize(("page", "name", "shown"), SHOWN)
def test_table_is_that_of_its_file(page, name, shown, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    module, function = PRINTERS[page]
    result = json.loads((ROOT / "bench" / "results" / name).read_text(encoding="utf-8"))
    assert shown == getattr(importlib.import_module(module), function)(result)


def test_the_pictures_of_the_reproduction_can_be_drawn(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    summarise = importlib.import_module("summarise_reproduction")
    results = sorted(str(path) for path in (ROOT / "bench" / "results").glob("reproduction*.json"))
    monkeypatch.setattr("sys.argv", ["", *results, "--figures", str(tmp_path)])
    summarise.main()
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in FIGURES.iterdir()}
    # Bytes depend on matplotlib's version; the numbers in the matrices do not.
    drawn, committed = (
        re.findall(r"<!-- (.*?) -->", (folder / "reproduction_confusion.svg").read_text())
        for folder in (tmp_path, FIGURES)
    )
    assert drawn == committed
