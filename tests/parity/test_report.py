"""docs/parity.md is about the rows that exist, and says of each that it meets its bars."""

from tests.parity import measure, report
from tests.parity.row import FINE
from tests.parity.rows import ROWS


def _table() -> dict[str, list[str]]:
    """Cells of the page by the name of their row."""
    lines = [line for line in report.PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {cells[0]: cells[1:] for cells in rows}


def test_the_page_has_every_row_and_no_other() -> None:
    assert list(_table()) == [row.name for row in ROWS], "run `make parity`"


def test_the_page_names_every_feature_and_no_number_misses_its_bar() -> None:
    table = _table()
    for row in ROWS:
        error, padded, ratio, equal, powers = table[row.name]
        assert float(error) <= measure.LOGIT_BAR
        assert float(padded or 0) <= measure.LOGIT_BAR
        assert float(ratio) <= 2
        assert equal in ("yes", "")
        assert (equal == "") == (row.family == "bert")
        measured = dict(entry.rsplit(" ", 1) for entry in powers.split("; ") if entry)
        assert list(measured) == list(row.switches), "run `make parity`"
        for name, power in measured.items():
            bar = measure.FINE_POWER_BAR if name in FINE else measure.POWER_BAR
            assert float(power) >= bar


def test_a_row_is_rendered_as_it_was_measured() -> None:
    result = report.Result(ROWS[0], 3.21e-6, None, 0.876, True, {"rope": 1.5, "scale": 0.25})
    line = report.render([result]).splitlines()[-1]
    assert line == f"| {ROWS[0].name} | 3.2e-06 |  | 0.88 | yes | rope 1.5e+00; scale 2.5e-01 |"
