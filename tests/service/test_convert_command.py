"""`headroom convert` writes a checkpoint that others read, and says what it cost."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from models import load_model
from models.checkpoints.history import Step, read_history
from models.config import HeadConfig
from models.heads.fidelity import compare
from models.heads.text import text_batches
from models.positions import RopeConfig
from models.tokenizer import Tokenizer
from service.cli import app
from service.commands.derived import Original
from tests.service.small_checkpoint import TEXT, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads = HeadConfig(4, 4, 8, rope=RopeConfig(10_000.0, 8))
    return write_checkpoint(tmp_path_factory.mktemp("convert"), heads, hidden_size=24)


def convert(model: Path, output: Path, *flags: str, kv_heads: str | None = "2") -> Any:
    arguments = ["convert", "--model", str(model), "--output", str(output)]
    text = str(model.parent / "text.txt")
    arguments += ["--text", text, "--calibration-tokens", "512", *flags]
    if kv_heads is not None:
        arguments += ["--kv-heads", kv_heads]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_the_checkpoint_is_read_by_transformers_too(model: Path, tmp_path: Path) -> None:
    answer = convert(model, tmp_path / "gqa", "--json", kv_heads="2,2")
    assert answer.exit_code == 0, answer.output
    report = json.loads(answer.stdout)
    ours = load_model(tmp_path / "gqa")
    assert report["heads"] == ours.config.head_label == "h4kv2d8"
    ids = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "gqa", dtype=torch.float32)
    with torch.inference_mode():
        assert (theirs(ids).logits - ours.logits(ids)).abs().max() <= 1e-5
    # The last tenth of the text is what is reported on.
    tokenizer = Tokenizer.from_directory(tmp_path / "gqa")
    held_out = [TEXT[len(TEXT) * 9 // 10 :]]
    batches = text_batches(tokenizer, held_out, num_tokens=16_384, seq_len=64)
    expected = compare(load_model(model), ours, batches)
    assert report["changed_loss"] == pytest.approx(expected.changed_loss, rel=1e-5)
    assert report["kl"] == pytest.approx(expected.kl, rel=1e-3)
    assert report["kv_bytes_per_token"] == {"original": 512, "converted": 256}
    assert [sorted(h for group in layer for h in group) for layer in report["groups"]] == [
        [0, 1, 2, 3]
    ] * 2


def test_the_report_says_what_was_saved_and_whether_it_is_ready(
    model: Path, tmp_path: Path
) -> None:
    answer = convert(model, tmp_path / "one", "--max-kl", "0", kv_heads="1")
    assert answer.exit_code == 0, answer.output
    assert "heads   h4kv4d8 -> h4kv1d8\n" in answer.stdout
    assert "kv      512 -> 128 bytes per token, 75% less\n" in answer.stdout
    assert (
        "not ready: kl is above 0; a trained model that was changed normally needs" in answer.stdout
    )
    same = convert(model, tmp_path / "same", kv_heads="4")
    assert "same first choice 100.0%" in same.stdout
    assert f"ready   {tmp_path / 'same'}\n" in same.stdout


@pytest.mark.parametrize(
    ("kv_heads", "message"),
    [
        ("3", "num_kv_heads of layer 0 is 3; allowed: a divisor of 4"),
        ("two", "--kv-heads is 'two'; allowed: a number, or numbers such as 8,4,2"),
        ("2,2,2", "num_kv_heads is [2, 2, 2]; allowed: one number, or one for each of 2 layers"),
    ],
)
def test_wrong_numbers_are_refused_and_nothing_is_written(
    model: Path, tmp_path: Path, kv_heads: str, message: str
) -> None:
    answer = convert(model, tmp_path / "none", kv_heads=kv_heads)
    assert answer.exit_code == 2
    assert f"error: {message}\n" == answer.stderr
    assert not (tmp_path / "none").exists()


def test_the_report_is_of_the_rounded_weights(model: Path, tmp_path: Path) -> None:
    flags = ["--weights", "int8", "--json"]
    answer = convert(model, tmp_path / "int8", *flags, kv_heads=None)
    assert answer.exit_code == 0, answer.output
    report = json.loads(answer.stdout)
    assert (report["heads"], report["groups"]) == ("h4kv4d8", None)
    assert 0 < report["kl"] < 0.01
    files = [path / "model.safetensors" for path in (model, tmp_path / "int8")]
    assert list(report["file_bytes"].values()) == [file.stat().st_size for file in files]
    assert report["only_headroom_reads_it"] is None
    both = convert(model, tmp_path / "both", *flags)
    assert both.exit_code == 0, both.output
    assert json.loads(both.stdout)["heads"] == "h4kv2d8"
    assert load_model(tmp_path / "both").config.layers[0].num_kv_heads == 2


def test_heads_ranks_and_bits_go_together(model: Path, tmp_path: Path) -> None:
    answer = convert(model, tmp_path / "all", "--rank", "8", "--weights", "int8")
    assert answer.exit_code == 0, answer.output
    assert "heads   h4kv4d8 -> h4kv2d8\n" in answer.stdout
    assert "rank    8 of each projection\n" in answer.stdout
    assert "format  only Headroom reads it: its projections have a rank\n" in answer.stdout
    assert load_model(tmp_path / "all").config.projection_rank == 8
    large = convert(model, tmp_path / "large", "--rank", "14", kv_heads=None)
    assert large.exit_code == 2
    expected = (
        "error: rank is 14; allowed: 1 to 13, above which layers.0.attention.output would not"
    )
    assert large.stderr.startswith(expected)
    assert not (tmp_path / "large").exists()


def test_the_report_says_who_reads_it(model: Path, tmp_path: Path) -> None:
    same = convert(model, tmp_path / "same", kv_heads="2")
    assert "format  transformers reads it too\n" in same.stdout
    different = convert(model, tmp_path / "different", kv_heads="4,1")
    reason = "its layers have different numbers of heads"
    assert f"format  only Headroom reads it: {reason}\n" in different.stdout
    script = convert(model, tmp_path / "script", "--json", kv_heads="4,1")
    assert json.loads(script.stdout)["only_headroom_reads_it"] == reason
    rounded = convert(model, tmp_path / "int8", "--weights", "int8", kv_heads=None)
    assert "transformers reads it too, with its package compressed-tensors\n" in rounded.stdout


def test_the_history_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["headroom", "convert", "--model", "a model", "--kv-heads", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    assert convert(model, tmp_path / "first").exit_code == 0
    text = str(model.parent / "text.txt")
    assert convert(tmp_path / "first", tmp_path / "second", "--text", text).exit_code == 0
    command = "headroom convert --model 'a model' --kv-heads 2"
    assert read_history(tmp_path / "second") == [Step("first", command), Step("second", command)]


@pytest.mark.parametrize(
    ("family", "allowed"),
    [
        ("mistral", "llama, the only format that is written"),
        ("bert", "a decoder, which predicts tokens"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    family: str, allowed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path, HeadConfig(4, 4, 8, rope=RopeConfig(1e4, 8)), hidden_size=24)
    if family == "bert":
        transformers.BertModel(
            transformers.BertConfig(
                vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                intermediate_size=32,
            )
        ).save_pretrained(path)  # fmt: skip
    else:
        fields = json.loads((path / "config.json").read_text()) | {"model_type": family}
        (path / "config.json").write_text(json.dumps(fields))
    monkeypatch.setattr(Original, "batches", None)
    answer = convert(path, tmp_path / "none")
    assert answer.exit_code == 2
    assert answer.stderr == f"error: family is '{family}'; allowed: {allowed}\n"
    assert not (tmp_path / "none").exists()


def test_tokens_that_others_read_are_those_of_the_original(model: Path, tmp_path: Path) -> None:
    original = shutil.copytree(model, tmp_path / "original")
    fields = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(
        json.dumps(fields | {"bos_token_id": 0, "pad_token_id": 2})
    )
    text = str(model.parent / "text.txt")
    assert convert(original, tmp_path / "gqa", "--text", text).exit_code == 0
    written = json.loads((tmp_path / "gqa/config.json").read_text())
    assert (written["bos_token_id"], written["pad_token_id"]) == (0, 2)


def test_a_disk_that_is_full_leaves_no_half_of_a_model(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "gqa"
    output.mkdir()
    (output / "tokenizer.json").symlink_to("/dev/full")
    answer = convert(model, output)
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: ")
    assert "No space left" in answer.stderr
    (output / "tokenizer.json").unlink()
    assert convert(model, output).exit_code == 0


def test_a_text_that_is_no_text_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe of a text")
    answer = convert(model, tmp_path / "none", "--text", str(tmp_path / "text"))
    assert answer.exit_code == 2
    (line,) = answer.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'text'} is no UTF-8 text: ")


def test_one_change_at_least_is_asked_for(model: Path, tmp_path: Path) -> None:
    answer = convert(model, tmp_path / "same", kv_heads=None)
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: nothing is to be changed; allowed: --kv-heads")


def test_a_model_is_not_overwritten(model: Path) -> None:
    answer = convert(model, model)
    assert answer.exit_code == 2
    assert "which holds a model; allowed: another directory" in answer.stderr
