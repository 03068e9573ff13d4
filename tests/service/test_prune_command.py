"""`headroom prune` writes a checkpoint that is served, and says what went and what it cost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from models import load_model
from models.config import HeadConfig
from models.positions import RopeConfig
from service.cli import app
from service.commands.derived import Original
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.sampling_params import SamplingParams
from tests.service.small_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads = HeadConfig(8, 4, 8, rope=RopeConfig(10_000.0, 8))
    return write_checkpoint(tmp_path_factory.mktemp("prune"), heads, hidden_size=32)


def prune(model: Path, output: Path, *flags: str) -> Any:
    text = str(model.parent / "text.txt")
    arguments = ["prune", "--model", str(model), "--output", str(output), "--text", text]
    arguments += ["--calibration-tokens", "512", *flags]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        (("--remove", "3", "--ranking", "gradient"), None),
        (("--keep", "3,1", "--ranking", "weights"), [3, 1]),
        (("--heads", "0.1,1.3"), [3, 3]),
    ],
)
def test_the_pruned_one_is_served(
    model: Path, tmp_path: Path, flags: tuple[str, ...], counts: list[int] | None
) -> None:
    answer = prune(model, tmp_path / "pruned", "--json", *flags)
    assert answer.exit_code == 0, answer.output
    report = json.loads(answer.stdout)
    pruned = load_model(tmp_path / "pruned")
    left = [heads.num_kv_heads for heads in pruned.config.layers]
    assert [heads.num_heads for heads in pruned.config.layers] == [2 * count for count in left]
    assert left == counts or counts is None
    assert sum(left) == 8 - len(report["removed"])
    assert report["heads"] == pruned.config.head_label
    assert report["kv_bytes_per_token"] == {"original": 512, "converted": 64 * sum(left)}
    assert report["changed_loss"] != report["original_loss"]
    prompt = list(range(3, 23))
    (generated,) = Engine.from_checkpoint(
        tmp_path / "pruned", EngineConfig(num_blocks=64)
    ).generate([prompt], SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0))
    for token in generated.token_ids:
        assert token == int(pruned.logits(torch.tensor([prompt]))[0, -1].argmax())
        prompt.append(token)


def test_the_report_is_for_people(model: Path, tmp_path: Path) -> None:
    answer = prune(model, tmp_path / "own", "--heads", "1.3", "--no-mean", "--max-kl", "100")
    assert answer.exit_code == 0, answer.output
    lines = [" ".join(line.split()) for line in answer.stdout.splitlines()]
    assert "removed 1.3" in lines
    assert "format only Headroom reads it: its layers have different numbers of heads" in lines
    assert "kv 512 -> 448 bytes per token, 12% less" in lines
    assert f"ready {tmp_path / 'own'}" in lines
    pair = prune(model, tmp_path / "pair", "--heads", "0.0,0.1,1.2,1.3", "--max-kl", "0")
    assert "format transformers reads it too" in " ".join(pair.stdout.split())
    assert "not ready: kl is above 0" in pair.stdout
    third = prune(model, tmp_path / "third", "--keep", "3,3")
    assert "only Headroom reads it: its width 32 is no multiple of 6 heads" in third.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "what is to go is not clear; allowed: one of --remove, --keep, --heads"),
        (("--remove", "1", "--keep", "1,1"), "allowed: one of --remove, --keep, --heads"),
        (("--remove", "7"), "heads to remove is 7; allowed: 0 to 6: each layer keeps one"),
        (("--heads", "5"), "--heads is '5'; allowed: layer.head, such as 0.3,2.1"),
        (("--heads", "2.0"), "layer to prune is 2; allowed: 0 to 1"),
        (("--keep", "a"), "--keep is 'a'; allowed: one number for each layer, such as 8,6,6,4"),
        (("--keep", "1"), "heads to keep is [1]; allowed: one number for each of 2 layers"),
    ],
)
def test_bad_input_is_one_line(
    model: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    answer = prune(model, tmp_path / "pruned", *flags)
    assert answer.exit_code == 2
    assert answer.stderr.splitlines()[-1].startswith("error: ")
    assert message in answer.stderr
    assert not (tmp_path / "pruned").exists()


def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path, HeadConfig(4, 4, 8, rope=RopeConfig(1e4, 8)), hidden_size=24)
    fields = json.loads((path / "config.json").read_text()) | {"model_type": "mistral"}
    (path / "config.json").write_text(json.dumps(fields))
    monkeypatch.setattr(Original, "batches", None)
    answer = prune(path, tmp_path / "none", "--remove", "1")
    assert answer.exit_code == 2
    assert answer.stderr == (
        "error: family is 'mistral'; allowed: llama, the only format that is written\n"
    )
    assert not (tmp_path / "none").exists()


def test_what_is_there_stays(model: Path) -> None:
    answer = prune(model, model, "--remove", "1")
    assert answer.exit_code == 2
    assert "which holds a model; allowed: another directory" in answer.stderr
