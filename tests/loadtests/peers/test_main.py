"""The comparison with other servers, short: with the only one that is installed here anyway."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from loadtests.peers.__main__ import main
from loadtests.peers.samples import SampleFile


def test_a_short_run_compares_and_goes_on(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "kv_heads": "4",
        "loads": "2x8+4",
        "layers": 1,
        "folder": tmp_path / "peers",
        "results": tmp_path / "results",
    }
    main(peers="transformers", rounds=1, fresh=True, **arguments)
    first = SampleFile(tmp_path / "results" / "samples.jsonl").all()
    assert [sample.key.peer for sample in first] == ["headroom", "transformers"]
    document = json.loads((tmp_path / "results" / "peers.json").read_text())
    assert [row["equal_starts"] for row in document["rows"]] == [1, 1]
    main(peers="transformers", rounds=2, fresh=False, **arguments)
    assert SampleFile(tmp_path / "results" / "samples.jsonl").all()[:2] == first
    assert json.loads((tmp_path / "results" / "peers.json").read_text())["rounds"] == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"peers": "llama"}, "peers has 'llama'; allowed: vllm, openvino"),
        ({"kv_heads": "5"}, "kv_heads has 5; allowed: a divisor of 12"),
        ({"loads": "8"}, "loads has '8'; allowed: as 8x128+128"),
    ],
)
def test_wrong_options_are_named_before_anything_starts(
    wrong: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"peers": "vllm", "kv_heads": "4", "loads": "1x8+4"} | wrong
    with pytest.raises(typer.Exit) as ended:
        main(**options, results=tmp_path / "results", fresh=False)
    assert ended.value.exit_code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "results").exists()
