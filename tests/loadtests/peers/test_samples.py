"""Loads as text, and samples that outlive an interruption."""

from pathlib import Path

import pytest

from loadtests.batches import Load
from loadtests.peers.samples import Key, Sample, SampleFile


def test_a_load_is_written_as_it_is_read() -> None:
    load = Load.parse("16x1024+64")
    assert load == Load(16, 1024, 64)
    assert load.text == "16x1024+64"


@pytest.mark.parametrize("text", ["", "8", "8x128", "0x128+1", "8x128+", "ax1+1", "8x128+64.5"])
def test_what_is_no_load_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: as 8x128"):
        Load.parse(text)


def test_samples_are_there_after_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    key = Key(12, 12, "2x4+10", "vllm", 0)
    SampleFile(path).add(Sample(key, 0.5, 1.0))
    again = SampleFile(path)
    assert key in again
    assert key._replace(round=1) not in again
    with path.open("a") as file:
        file.write('{"kv_heads": 12, "lo')  # the run was interrupted here
    again = SampleFile(path)
    again.add(Sample(key._replace(round=1), 0.25, None))
    assert [sample.tokens_per_s for sample in SampleFile(path).all()] == [40, 80]
    assert SampleFile(path, fresh=True).all() == []
