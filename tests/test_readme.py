"""The README says what the committed files say, and its example runs."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_results_table_is_that_of_the_committed_file(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import summarise_runs

    runs = json.loads((ROOT / "bench" / "results" / "ham10000.json").read_text())["runs"]
    shown = re.search(r"<!-- results -->\n(.*?)\n<!-- /results -->", README, re.DOTALL)
    assert shown[1].startswith(summarise_runs.table(runs))
    sys.modules.pop("summarise_runs")


def test_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})


def test_links_lead_to_files():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / target).is_file(), target
