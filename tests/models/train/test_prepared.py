"""What a training reads is kept whole, or named where it is not."""

import shutil
from pathlib import Path

import pytest
import torch

from models.checkpoints.writer import save_model
from models.errors import CheckpointError, ConfigError, TokenizerError, TrainingError
from models.tokenizer import read_tokenizer
from models.train.corpus import Corpus, Document
from models.train.prepared import STATE_FILE, Prepared, prepare
from models.train.sources import STANDARD_LIBRARY
from models.train.tokenizer import encode_documents, train_tokenizer
from models.transformer import random_model
from tests.checkpoints import byte_tokenizer
from tests.models import tiny

TEXT = "the cat sat on the mat; the dog — größer — lay on the log.\n" * 4
CORPUS = Corpus(
    (STANDARD_LIBRARY,),
    tuple(Document(STANDARD_LIBRARY.name, f"{index}.py", TEXT[index:]) for index in range(200)),
)


def begin(work: Path, start: Path | None = None) -> Prepared:
    return prepare(work, CORPUS, start, None, vocab_size=290)


def same(one: Prepared, other: Prepared) -> bool:
    return (
        torch.equal(one.train, other.train)
        and torch.equal(one.validation, other.validation)
        and one.tokenizer.to_str() == other.tokenizer.to_str()
    )


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer of its own."""
    directory = tmp_path / "start"
    tokenizer = train_tokenizer(["other words, and others"], 270)
    config = tiny.llama(vocab_size=tokenizer.get_vocab_size())
    save_model(random_model(config, seed=0), directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_the_next_part_reads_the_same(tmp_path: Path) -> None:
    first = begin(tmp_path / "work")
    assert torch.equal(first.train, encode_documents(first.tokenizer, CORPUS.texts("train")))
    assert same(begin(tmp_path / "work"), first)


def test_a_start_brings_its_tokenizer(tmp_path: Path, start: Path) -> None:
    of_start = read_tokenizer(start)
    assert begin(tmp_path / "work", start).tokenizer.get_vocab() == of_start.get_vocab()
    assert begin(tmp_path / "other").tokenizer.get_vocab() != of_start.get_vocab()


def test_a_start_needs_a_tokenizer_that_begins_texts(tmp_path: Path, start: Path) -> None:
    (start / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"start/tokenizer\.json is not a tokenizer"):
        begin(tmp_path / "work", start)
    byte_tokenizer().save(str(start / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"before a text is \[\]; allowed: \[0\]"):
        begin(tmp_path / "work", start)
    shutil.rmtree(start)
    with pytest.raises(CheckpointError, match="start is not a directory that holds a model"):
        begin(tmp_path / "work", start)
    assert not (tmp_path / "work").exists()


def test_a_tokenizer_belongs_to_what_a_start_is(tmp_path: Path, start: Path) -> None:
    begin(tmp_path / "work", start)
    train_tokenizer(["some third words"], 270).save(str(start / "tokenizer.json"))
    with pytest.raises(TrainingError, match="began with another model to start from; allowed"):
        begin(tmp_path / "work", start)


@pytest.mark.parametrize("name", ["tokens.safetensors", "tokenizer.json", "corpus.json"])
@pytest.mark.parametrize("damage", [None, b"", b"{", b"[]", b"\xff"])
def test_a_damaged_directory_is_named(tmp_path: Path, name: str, damage: bytes | None) -> None:
    work = tmp_path / "work"
    begin(work)
    (work / STATE_FILE).touch()
    (work / name).unlink()
    if damage is not None:
        (work / name).write_bytes(damage)
    with pytest.raises(
        TrainingError, match=rf"work/{name} cannot be read: .*; to begin the training anew, delete"
    ):
        begin(work)


@pytest.mark.parametrize("name", ["tokens", "tokenizer", "corpus"])
def test_a_full_disk_leaves_nothing_half(tmp_path: Path, name: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / f"{name}.partial").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"work cannot be written to: .*No space left"):
        begin(work)
    assert same(begin(work), begin(tmp_path / "other"))
