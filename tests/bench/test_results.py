"""docs/performance.md shows what the committed result files hold."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOWN = re.findall(
    r"<!-- (\S+\.json) -->\n(.*?)\n<!-- end -->",
    (ROOT / "docs" / "performance.md").read_text(),
    re.DOTALL,
)


def test_a_table_is_shown():
    assert SHOWN


@pytest.mark.parametrize(("name", "shown"), SHOWN)
def test_table_is_that_of_its_file(name, shown, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import summarise_bench

    result = json.loads((ROOT / "bench" / "results" / name).read_text())
    assert shown == summarise_bench.table(result)
    sys.modules.pop("summarise_bench")
