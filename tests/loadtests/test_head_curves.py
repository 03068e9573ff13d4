"""Curves of losses begin at the original's, are of text that nothing was fitted to, and their
report says which rankings lose."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tokenizers
import torch
import typer
from torch import Tensor

from loadtests.head_curves import merging, removal
from loadtests.head_curves.__main__ import main
from loadtests.head_curves.merging import kv_head_counts, measure_merging
from loadtests.head_curves.removal import measure_removal, removal_counts, spearman
from loadtests.head_curves.report import beaten_draws, lost_counts, markdown
from models.checkpoints.writer import save_model
from models.config import HeadConfig, ModelConfig
from models.errors import ConfigError
from models.heads.importance import least_important, rank_heads
from models.heads.prune import prune
from models.positions import RopeConfig
from models.train.evaluate import validation_loss
from models.train.tokenizer import encode_documents, train_tokenizer
from models.transformer import random_model
from service.commands.derived import Original
from tests.checkpoints import byte_tokenizer
from tests.models import tiny

FITTED = ("the cat sat on the mat; the dog — größer — lay on the log.\n" * 70)[:3600]
HELD_OUT = ("what nobody has read: owls, 17 of them, and (perhaps) a fox?\n" * 7)[:400]
SVG = "{http://www.w3.org/2000/svg}"


def config_of(num_kv_heads: int, vocab_size: int) -> ModelConfig:
    heads = HeadConfig(4, num_kv_heads, 8, rope=RopeConfig(10_000.0, 8))
    return tiny.llama(vocab_size=vocab_size, layers=(heads,) * 2)


def write_checkpoint(path: Path, tokenizer: tokenizers.Tokenizer, num_kv_heads: int = 4) -> Path:
    model = random_model(config_of(num_kv_heads, tokenizer.get_vocab_size()), seed=0)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(4.0)  # else nothing that heads do matters
    save_model(model, path)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mha"), train_tokenizer([FITTED], 300))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last tenth is held out."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(FITTED + HELD_OUT, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def original(checkpoint: Path, text: Path) -> Original:
    return Original.load(str(checkpoint), text)


@pytest.fixture(scope="module")
def held_out(original: Original) -> Tensor:
    return torch.cat(original.held_out_batches())


def test_a_run_writes_figures_tables_and_pictures(
    checkpoint: Path,
    text: Path,
    original: Original,
    held_out: Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = tmp_path / "results"
    main(
        model=str(checkpoint),
        text=text,
        calibration_tokens=256,
        uptrain_tokens=2 * 2048,
        draws=2,
        results=results,
    )
    document = json.loads((results / "curves.json").read_text())
    whole = validation_loss(original.model, held_out)
    assert document["original_loss"] == whole
    settings = ("learning_rate", "repeat_share", "needle_share", "seed")
    assert [document[f"uptrain_{name}"] for name in settings] == [5e-4, 0.1, 0.02, 0]
    points = {
        (point["method"], point["uptrain_tokens"] > 0, point["kv_heads"]): point
        for point in document["merging"]
    }
    assert len(points) == 3 * 3 + 3  # three methods, and one of them trained on
    for (method, is_uptrained, kv_heads), point in points.items():
        assert point["kv_bytes_per_token"] == 2 * 2 * kv_heads * 8 * 4
        if kv_heads == 4 and not is_uptrained:
            assert point["loss"] == pytest.approx(whole, abs=1e-6), method
        elif not is_uptrained:
            assert abs(point["loss"] - whole) > 1e-3, method
        else:
            assert point["loss"] < points[method, False, kv_heads]["loss"] - 1e-3
    removed = document["removal"]
    assert removed["counts"] == [0, 1, 2, 3, 4, 5, 6]
    for losses in (*removed["losses"].values(), *removed["drawn"]):
        assert losses[0] == pytest.approx(whole, abs=1e-6)
        assert len(set(losses)) == 7
    assert removed["spearman"]["ablation"] == pytest.approx(1.0)
    tables = (results / "curves.md").read_text()
    assert document["machine"]["torch"] in tables
    assert tables in capsys.readouterr().out
    pictures = [
        ElementTree.parse(results / name).getroot()
        for name in ("kv-bytes.svg", "heads-removed.svg")
    ]
    assert [len(list(root.iter(f"{SVG}polyline"))) for root in pictures] == [4, 6]
    assert [len(list(root.iter(f"{SVG}polygon"))) for root in pictures] == [0, 1]


def test_nothing_is_fitted_to_held_out_text(
    original: Original, held_out: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[str] = []

    def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> Tensor:
        trained_on.extend(texts)
        return encode_documents(tokenizer, texts)

    monkeypatch.setattr(merging, "encode_documents", encode)
    calibration = original.batches(256)
    measure_merging(original, calibration, held_out, uptrain_tokens=2048, tell=lambda *_: None)
    assert trained_on == [FITTED]
    read = original.tokenizer.decode(torch.cat(calibration).flatten().tolist())
    assert not {"nobody", "owls", "fox"} & set(read.split())
    assert "owls" in original.tokenizer.decode(held_out.flatten().tolist())


def test_draws_are_decided_by_their_seeds(
    original: Original, held_out: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "COMPARED", ("ablation",))
    calibration = original.batches(256)

    def drawn(draws: int) -> list[list[float]]:
        measured = measure_removal(
            original.model, calibration, held_out, draws=draws, tell=lambda *_: None
        )
        return measured.drawn

    two, three = drawn(2), drawn(3)
    assert three[:2] == two
    assert two[0] != two[1] != three[2]
    scores = rank_heads(original.model, [], "random", seed=1)
    pruned = prune(original.model, least_important(scores, 3), calibration)
    assert two[1][3] == validation_loss(pruned, held_out)


def test_ranks_that_are_shared_count_by_their_mean() -> None:
    def of(*values: float) -> list[Tensor]:
        return list(torch.tensor(values, dtype=torch.float64).split(2))

    assert spearman(of(1, 2, 3, 9), of(0.1, 7, 7.5, 8)) == pytest.approx(1.0)
    assert spearman(of(1, 2, 3, 9), of(4, 3, 2, 1)) == pytest.approx(-1.0)
    assert spearman(of(1, 2, 2, 3), of(1, 2, 3, 4)) == pytest.approx(0.9486832980505138)


def test_numbers_of_heads() -> None:
    assert kv_head_counts(tiny.llama(layers=(HeadConfig(8, 8, 8),) * 5)) == [8, 4, 2, 1]
    assert removal_counts(tiny.llama(layers=(HeadConfig(8, 8, 8),) * 5)) == [
        0, 5, 10, 15, 20, 25, 30,
    ]  # fmt: skip
    assert removal_counts(tiny.llama(layers=(HeadConfig(2, 2, 8),) * 3)) == [0, 1, 2, 3]


def test_the_report_names_the_rankings_that_lose() -> None:
    removed: dict[str, Any] = {
        "counts": [0, 1, 2],
        "losses": {
            "ablation": [2.0, 2.1, 2.4],
            "gradient": [2.0, 2.2, 2.5],
            "gates": [2.0, 2.2, 2.5],
            "weights": [2.0, 2.5, 3.1],
            "entropy": [2.0, 2.7, 3.3],
        },
        "drawn": [[2.0, 2.4, 3.0], [2.0, 2.8, 3.0], [2.0, 2.6, 3.6]],
        "spearman": dict.fromkeys(("ablation", "gradient", "gates", "weights", "entropy"), 1.0),
    }
    document: dict[str, Any] = {
        **dict.fromkeys(("model", "heads", "text", "date", "command"), "some"),
        **dict.fromkeys(("held_out_tokens", "calibration_tokens", "original_loss"), 2),
        "machine": {"cpu": "some", "threads": 1, "torch": "2", "python": "3"},
        "uptrain_tokens": 0,
        "merging": [
            {
                "method": method,
                "uptrain_tokens": 0,
                "kv_heads": 1,
                "kv_bytes_per_token": 64,
                "loss": 3.0,
            }
            for method in merging.METHODS
        ],
        "removal": removed,
    }
    # On average draws cost 2.6 and 3.2.
    assert lost_counts(removed, "weights") == []
    assert lost_counts(removed, "entropy") == [1, 2]
    assert beaten_draws(removed, "weights") == [2, 1]
    tables = markdown(document)
    assert "**Not every ranking beats random: entropy.**" in tables
    assert "- `entropy` beats the mean of the draws at **no** point; it beats 1, 1 of 3" in tables
    removed["losses"]["entropy"][1] = 2.5
    assert (
        "- `entropy` beats the mean of the draws with 1 heads removed, and **not** with 2"
        in markdown(document)
    )
    removed["losses"]["entropy"][2] = 3.1
    assert "Every ranking beats random at every point." in markdown(document)


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as raised:
        main(model=str(tmp_path / "none"), results=tmp_path / "results")
    assert raised.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "none" in line
    assert not (tmp_path / "results").exists()


def test_results_that_cannot_be_written_are_one_line_before_anything_is_measured(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(typer.Exit) as raised:
        main(model=str(checkpoint), text=text, results=tmp_path / "file" / "results")
    assert raised.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: [Errno 20] Not a directory")


def test_one_key_value_head_cannot_be_merged(text: Path, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "mqa", byte_tokenizer(), num_kv_heads=1)
    original = Original.load(str(path), text)
    with pytest.raises(ConfigError, match="num_kv_heads is 1; allowed: 2 or more"):
        measure_merging(original, [], torch.empty(0), uptrain_tokens=0, tell=lambda *_: None)


def test_rows_to_train_on_need_the_tokenizer_of_the_bundled_models(
    text: Path, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "bytes", byte_tokenizer())
    original = Original.load(str(path), text)
    with pytest.raises(ConfigError, match=r"before a text is \[\]; allowed: \[0\]"):
        measure_merging(original, [], torch.empty(0), uptrain_tokens=2048, tell=lambda *_: None)
