"""The demo model is made in one go, and what is on disk is what the card says."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend

from models import load_model
from models.checkpoints.loader import check_checkpoint
from models.tokenizer import IncrementalDetokenizer, Tokenizer
from models.train.corpus import Corpus
from models.train.demo import demo_config, make_demo
from models.train.trainer import TrainConfig, TrainProgress, bits_per_byte
from models.transformer import Transformer
from tests.models.train.test_trainer import TEXT

CORPUS = Corpus(train=(TEXT, TEXT, TEXT), held_out=("the dog sat — on the mat.\n" * 4,))
CONFIG = TrainConfig(max_seconds=1.5, batch_tokens=64, seq_len=16, final_seq_len=32, seed=3)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, list[TrainProgress]]:
    directory = tmp_path_factory.mktemp("made") / "demo"
    progress: list[TrainProgress] = []
    bpb = make_demo(directory, CONFIG, num_threads=7, on_step=progress.append, corpus=CORPUS)
    return directory, bpb, progress


Made = tuple[Path, float, list[TrainProgress]]


def test_the_directory_loads(demo: Made) -> None:
    directory, _, _ = demo
    model = load_model(directory)
    tokenizer = Tokenizer.for_model(directory, model.config)
    assert check_checkpoint(directory) == model.config
    assert model.config.name == "demo"
    assert model.config.vocab_size == tokenizer.vocab_size < 2048, "a small corpus has few words"
    assert model.config.layers == demo_config().layers
    assert model.config.eos_token_ids == (1,)
    assert tokenizer.token_of(0) == "<bos>"
    assert tokenizer.encode("the")[0] == 0
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(tokenizer.encode("the — mat")) == "the — mat"


def test_the_measured_bits_are_those_of_the_written_model(demo: Made) -> None:
    directory, bpb, _ = demo
    tokenizer = Backend.from_file(str(directory / "tokenizer.json"))
    measured = bits_per_byte(load_model(directory), tokenizer, CORPUS.held_out)
    assert measured == pytest.approx(bpb, rel=1e-6)


def test_the_card_says_what_was_measured(demo: Made) -> None:
    directory, bpb, progress = demo
    card = (directory / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"| held-out bits per byte | **{bpb:.3f}** on 1 files" in card
    assert "`h6kv2d32`" in card
    assert "on 7 CPU cores, seed 3" in card
    assert f"{load_model(directory).num_parameters / 1e6:.2f} M parameter" in card
    assert f"byte-level BPE, {load_model(directory).config.vocab_size} tokens" in card
    shown = [line for line in card.splitlines() if line.startswith("| ") and line[2].isdigit()]
    losses = {f"| {point.step} | {point.loss:.3f} |" for point in progress}
    assert shown
    assert losses.issuperset(shown)
    assert "{" not in card, "every blank is filled"


def test_training_was_reported_and_learned(demo: Made) -> None:
    _, bpb, progress = demo
    assert len(progress) >= 3
    assert progress[-1].loss < progress[0].loss
    assert 0 < bpb < 20


def test_only_plain_files_are_written(demo: Made) -> None:
    directory, _, _ = demo
    assert sorted(path.name for path in directory.iterdir()) == [
        "MODEL_CARD.md", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert json.loads((directory / "config.json").read_text())["model_type"] == "llama"


def test_the_demo_has_the_size_that_it_claims() -> None:
    config = demo_config()
    with torch.device("meta"):
        model = Transformer(config)
    assert model.num_parameters == pytest.approx(2.8e6, rel=0.05)
    assert config.layers[0].kind == "gqa"
    assert config.layers[0].num_queries_per_kv == 3
