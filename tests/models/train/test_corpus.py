"""The corpus is split the same way everywhere, and its tokenizer loses nothing."""

import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from models.train.corpus import Corpus, standard_library, train_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n" * 5, "class Point:\n    x = 1\n" * 5]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def test_both_parts_of_the_standard_library_hold_text(corpus: Corpus) -> None:
    num_files = len(corpus.train) + len(corpus.held_out)
    assert num_files > 300
    assert 0.005 < len(corpus.held_out) / num_files < 0.05, "about 2 %"
    assert sum(map(len, corpus.held_out)) > 10_000
    assert 4e6 < sum(map(len, corpus.train)) < 40e6


def test_no_text_is_in_both_parts(corpus: Corpus) -> None:
    # Empty package files are alike and teach nothing.
    assert not {text for text in corpus.train if text.strip()} & set(corpus.held_out)


def test_the_split_is_the_same_every_time(corpus: Corpus) -> None:
    assert standard_library() == corpus


def test_every_source_is_read_once_and_no_test_is(corpus: Corpus) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    everything = [*corpus.train, *corpus.held_out]
    for module in ("argparse.py", "asyncio/tasks.py", "json/decoder.py"):
        assert everything.count((root / module).read_text(encoding="utf-8")) == 1
    for skipped in ("site-packages", "test", "idlelib/idle_test"):
        texts = (
            file.read_text(encoding="utf-8", errors="replace")
            for file in sorted((root / skipped).rglob("*.py"))[:20]
            if file.stat().st_size > 1000
        )
        assert not set(texts) & set(everything)


@settings(max_examples=200)
@given(text=st.text(max_size=30) | st.sampled_from(TEXTS))
def test_any_text_round_trips_behind_bos(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text).ids
    assert token_ids[0] == 0
    assert 0 not in token_ids[1:]
    assert 1 not in token_ids
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.encode(text, add_special_tokens=False).ids == token_ids[1:]


def test_special_tokens_come_first_and_the_vocabulary_is_no_larger_than_asked(
    tokenizer: Tokenizer,
) -> None:
    assert tokenizer.token_to_id("<bos>") == 0
    assert tokenizer.token_to_id("<eos>") == 1
    assert 258 < tokenizer.get_vocab_size() <= 300


def test_the_tokenizer_compresses_what_it_has_read(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(TEXTS[0]).ids) < len(TEXTS[0]) / 2


def test_the_same_texts_make_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(TEXTS, 300).to_str() == tokenizer.to_str()
