"""The tokenizer loses nothing, and documents lie behind one another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from models.train.tokenizer import BOS, EOS, encode_documents, train_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n" * 5, "class Point:\n    x = 1\n" * 5]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@settings(max_examples=100)
@given(text=st.text(max_size=30) | st.sampled_from(TEXTS))
def test_any_text_round_trips_behind_bos(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text).ids
    assert token_ids[0] == BOS
    assert not {BOS, EOS, 2} & set(token_ids[1:])
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.encode(text, add_special_tokens=False).ids == token_ids[1:]


def test_special_tokens_come_first_and_the_vocabulary_is_no_larger_than_asked(
    tokenizer: Tokenizer,
) -> None:
    assert [tokenizer.id_to_token(index) for index in range(3)] == ["<bos>", "<eos>", "<pad>"]
    assert 259 < tokenizer.get_vocab_size() <= 300


def test_the_tokenizer_compresses_what_it_has_read(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(TEXTS[0]).ids) < len(TEXTS[0]) / 2


def test_the_same_texts_make_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(TEXTS, 300).to_str() == tokenizer.to_str()


@pytest.mark.parametrize("count", [1, 2, 130])
def test_documents_lie_behind_one_another(tokenizer: Tokenizer, count: int) -> None:
    texts = [f"def f{index}(größe): pass" for index in range(count)]
    expected = [i for text in texts for i in [*tokenizer.encode(text).ids, EOS]]
    ids = encode_documents(tokenizer, texts)
    assert ids.dtype == torch.int32
    assert ids.tolist() == expected
    assert expected.count(BOS) == expected.count(EOS) == count
