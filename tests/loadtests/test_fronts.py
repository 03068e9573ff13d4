"""The comparison of fronts, short: a tiny model, few tokens, all three really run."""

import json
from pathlib import Path

import pytest
import typer

from loadtests import fronts


@pytest.mark.ray
@pytest.mark.slow
def test_a_short_run_writes_what_the_long_one_does(tmp_path: Path) -> None:
    fronts.main(
        loads="2x4+4",
        rounds=1,
        kv_heads=4,
        layers=1,
        results=tmp_path,
        name="short",
    )
    document = json.loads((tmp_path / "short.json").read_text())
    assert list(document["loads"]) == ["2x4+4"]
    for rows in document["loads"].values():
        assert list(rows) == ["engine", "standalone", "ray"]
        for row in rows.values():
            (rate,) = row["tokens_per_s"]
            assert rate > 0
            assert row["share_of_engine"] == pytest.approx(
                rate / rows["engine"]["tokens_per_s"][0], rel=1e-2
            )
    assert document["model"]["heads"] == "h12kv4d64"
    for idle in document["idle"].values():
        assert 0 < idle["seconds_to_ready"] < 60
        assert 50 < idle["replica_mib"] <= idle["all_processes_mib"]
    table = (tmp_path / "short.md").read_text()
    assert "| 2x4+4 | standalone |" in table
    assert document["machine"]["torch"] in table


def test_a_load_that_is_none_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match=r"loads has '8x'; allowed: as 8x128\+128"):
        fronts.main(loads="8x")
