"""The comparison of fronts, short: a tiny model, few tokens, all three really run."""

import json
from pathlib import Path

import pytest

from loadtests import fronts


@pytest.mark.ray
def test_a_short_run_writes_what_the_long_one_does(tmp_path: Path) -> None:
    fronts.main(
        clients=2,
        prompt=4,
        output=4,
        rounds=1,
        kv_heads=4,
        layers=1,
        results=tmp_path,
        name="short",
    )
    document = json.loads((tmp_path / "short.json").read_text())
    assert list(document["rows"]) == ["engine", "standalone", "ray"]
    for row in document["rows"].values():
        assert len(row["tokens_per_s"]) == 1
        assert row["tokens_per_s"][0] > 0
    assert document["model"] == "h12kv4d64"
    for idle in document["idle"].values():
        assert 0 < idle["seconds_to_ready"] < 60
        assert 50 < idle["replica_mib"] <= idle["all_processes_mib"]
    table = (tmp_path / "short.md").read_text()
    assert "| standalone |" in table
    assert document["machine"]["torch"] in table
