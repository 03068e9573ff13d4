"""The comparison of the forms of attention, short: few tokens, all of them really run."""

import json
from pathlib import Path

import pytest
import torch

from loadtests import attention


def test_a_short_run_writes_what_the_long_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_MIN_SECONDS", 0.0)
    attention.main(
        heads="2:2,4:1",
        tokens="16,256",
        dtypes="float32,bfloat16",
        head_dim=8,
        repeats=2,
        results=tmp_path,
        name="short",
    )
    document = json.loads((tmp_path / "short.json").read_text())
    assert [(row["heads"], row["kv_heads"], row["tokens"]) for row in document["rows"]] == [
        (2, 2, 16),
        (2, 2, 256),
        (4, 1, 16),
        (4, 1, 256),
    ] * 2
    for row in document["rows"]:
        bar = 2e-6 if row["dtype"] == "float32" else 0.05
        for name in attention.IMPLEMENTATIONS:
            fastest, median, slowest = (
                row[name][f"ms_{which}"] for which in ("fastest", "median", "slowest")
            )
            assert 0 < fastest <= median <= slowest
            assert 0 < row[name]["difference_from_float64"] < bar
        if row["tokens"] == 256:
            scores_mib = row["heads"] * 256 * 256 * 4 / 2**20
            assert row["sdpa"]["extra_mib"] < scores_mib < row["explicit"]["extra_mib"]
    table = (tmp_path / "short.md").read_text()
    assert "| 4 : 1 | 256 | bfloat16 |" in table
    assert document["machine"]["torch"] in table


@pytest.mark.parametrize("kept", [1, 3])
def test_extra_memory_is_the_peak_of_what_lives_at_once(kept: int) -> None:
    mebibyte = 2**18  # of float32

    def call() -> torch.Tensor:
        alive = [torch.empty(mebibyte) for _ in range(kept)]
        del alive
        for _ in range(2):  # freed each time
            torch.empty(mebibyte)
        return torch.empty(1)

    # Alone, each of the later ones is less than the first ones together.
    assert attention._extra_bytes(call) // 2**20 == kept
