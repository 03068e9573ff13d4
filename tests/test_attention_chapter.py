"""The chapter on attention: its snippets print what it says, its table is the measured one."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/attention.md").read_text()
RESULTS = json.loads((ROOT / "loadtests/results/attention.json").read_text())


def test_every_snippet_prints_what_the_page_says() -> None:
    snippets = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert len(snippets) == PAGE.count("```python")
    names: dict[str, object] = {}  # later snippets go on where earlier ones ended
    for code, expected in snippets:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue() == expected


@pytest.mark.parametrize("form", ["sdpa", "explicit", "split"])
def test_the_table_shows_the_kept_results(form: str) -> None:
    measured = {
        (row["heads"], row["kv_heads"], row["tokens"], row["dtype"]): row[form]
        for row in RESULTS["rows"]
    }
    column = {"sdpa": 0, "explicit": 1, "split": 2}[form]
    rows = re.findall(r"^\| (\d+) : (\d+) \| ([\d,]+) \| (\w+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) >= 4
    for heads, kv_heads, tokens, dtype, cells in rows:
        result = measured[int(heads), int(kv_heads), int(tokens.replace(",", "")), dtype]
        shown = [float(cell.replace(",", "")) for cell in cells.split(" | ")]
        assert shown[column] == pytest.approx(result["ms_fastest"], rel=0.06)
        assert shown[3 + column] == pytest.approx(result["extra_mib"], rel=0.06)
        assert shown[6 + column] == pytest.approx(result["difference_from_float64"], rel=0.06)
