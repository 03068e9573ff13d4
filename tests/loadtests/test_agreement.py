"""The comparison of the two clients, short: against the clock, both see the same."""

import json
from pathlib import Path

import pytest
import typer

from loadtests import agreement
from loadtests.summary import summarize
from tests.loadtests.conftest import RealServer
from tests.loadtests.test_summary import SAMPLES

pytestmark = pytest.mark.alone

SERVED = [sample for sample in SAMPLES if sample.code == "OK"]


def test_the_ratio_is_of_medians() -> None:
    runs = {
        "locust": [summarize(SERVED, client_cpu=cpu, began=0.0) for cpu in (0.1, 0.4, 0.9)],
        "asyncio": [summarize(SERVED, client_cpu=cpu, began=0.0) for cpu in (0.2, 0.2, 0.3)],
    }
    rows = agreement.compare(runs)
    assert rows["client_cpu"] == {"locust": 0.4, "asyncio": 0.2, "ratio": 2.0}
    assert rows["output_tokens_per_s"]["ratio"] == 1.0
    assert "client_wait" not in rows  # no kernel said


def test_a_short_run_writes_both_files(real_server: RealServer, tmp_path: Path) -> None:
    agreement.main(
        target=real_server.target,
        rounds=1,
        users=2,
        requests=4,
        prompt="fixed:4",
        output="fixed:8",
        results=tmp_path,
    )
    document = json.loads((tmp_path / "agreement.json").read_text())
    for name in ("locust", "asyncio"):
        (run,) = document["runs"][name]
        assert (run["requests"], run["output_tokens"]) == (4, 32)
    row = document["rows"]["output_tokens_per_s"]
    assert row["ratio"] == pytest.approx(row["locust"] / row["asyncio"])
    assert f"{row['ratio']:.2f} |" in (tmp_path / "agreement.md").read_text()


def test_a_load_that_fails_is_no_comparison(
    real_server: RealServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as exit:  # longer than the context
        agreement.main(target=real_server.target, rounds=1, prompt="fixed:100000", results=tmp_path)
    assert exit.value.exit_code == 1
    assert "error: locust: requests failed: {'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
