"""Streamed text is the decoded text: nothing early, nothing lost; broken files are named."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.errors import TokenizerError
from models.tokenizer import IncrementalDetokenizer, Tokenizer
from tests import checkpoints
from tests.models import tiny
from tests.models.text_tokenizers import (
    ALPHABET,
    BYTE_FALLBACK,
    MAKERS,
    REPLACEMENT,
    byte_level,
    llama,
    stream,
    texts,
)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=200)
@given(text=texts)
def test_text_survives_the_way_there_and_back(name: str, text: str) -> None:
    tokenizer = MAKERS[name]()
    token_ids = tokenizer.encode(text)
    # Metaspace can't tell a first space of the text from the one that it adds.
    lost = " " if name == "metaspace" else ""
    assert tokenizer.decode(token_ids) == text.removeprefix(lost)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in token_ids)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=300)
@given(text=texts)
@example(text="👩\u200d👩 é\n")
def test_streamed_text_is_the_text_and_holds_no_broken_character(name: str, text: str) -> None:
    tokenizer = MAKERS[name]()
    token_ids = tokenizer.encode(text)
    pieces, rest, _ = stream(tokenizer, token_ids)
    assert "".join(pieces) + rest == tokenizer.decode(token_ids)
    if REPLACEMENT not in text:
        assert REPLACEMENT not in "".join(pieces)
        assert rest == "", "valid text is complete with its last token"


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=100)
@given(text=texts, cut=st.integers(0, 20))
def test_a_character_is_released_with_its_last_byte(name: str, text: str, cut: int) -> None:
    """After any number of tokens, only bytes of one unfinished character are held back."""
    tokenizer = MAKERS[name]()
    token_ids = tokenizer.encode(text)[:cut]
    pieces, _, _ = stream(tokenizer, token_ids)
    wholes = (tokenizer.decode(token_ids[:end]) for end in range(len(token_ids), -1, -1))
    if REPLACEMENT not in text:
        assert "".join(pieces) == next(whole for whole in wholes if REPLACEMENT not in whole)


@settings(max_examples=500)
@given(token_ids=st.lists(st.integers(0, checkpoints.VOCAB_SIZE - 1), max_size=16))
@example(token_ids=[228, 121])
def test_any_bytes_are_streamed_as_they_decode(token_ids: list[int]) -> None:
    pieces, rest, _ = stream(byte_level(), token_ids)
    assert "".join(pieces) + rest == byte_level().decode(token_ids)


@pytest.mark.parametrize("name", BYTE_FALLBACK)
@settings(max_examples=500)
@given(data=st.data())
def test_byte_tokens_that_are_no_text_harm_nothing_around_them(
    name: str, data: st.DataObject
) -> None:
    """A model may emit any ids: bytes that are not UTF-8 show as U+FFFD, the rest as it is.

    The decoder replaces a whole run of byte tokens when one of them is invalid; characters of the
    run that were already streamed can't be taken back, so only the rest must agree.
    """
    tokenizer = MAKERS[name]()
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    pieces, rest, _ = stream(tokenizer, token_ids)
    streamed, whole = "".join(pieces) + rest, tokenizer.decode(token_ids)
    if REPLACEMENT in whole:
        assert REPLACEMENT in streamed
        assert streamed.startswith(whole.partition(REPLACEMENT)[0])
        assert streamed.endswith(whole.rpartition(REPLACEMENT)[2])
    else:
        assert streamed == whole


@pytest.mark.parametrize("name", MAKERS)
def test_an_unfinished_character_is_marked_by_the_flush_only(name: str) -> None:
    tokenizer = MAKERS[name]()
    token_ids = tokenizer.encode("ab😀")
    pieces, rest, _ = stream(tokenizer, token_ids[:-1])
    assert "".join(pieces) == "ab"
    assert set(rest) == {REPLACEMENT}


@pytest.mark.parametrize("name", MAKERS)
def test_special_tokens_have_no_text(name: str) -> None:
    tokenizer = MAKERS[name]()
    special = tokenizer.vocab_size - 1 if name == "byte-level" else 2
    token_ids = tokenizer.encode("a b", add_special_tokens=False)
    with_specials = [special, *token_ids[:1], special, *token_ids[1:], special]
    pieces, rest, _ = stream(tokenizer, with_specials)
    assert "".join(pieces) + rest == "a b"
    assert pieces[0] == pieces[2] == pieces[-1] == ""


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_gives_nothing(name: str) -> None:
    assert stream(MAKERS[name](), [], ["a"]) == ([], "", None)
    assert IncrementalDetokenizer(MAKERS[name]()).push([]) == ""


# --- files -------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(TokenizerError, match="nowhere"):
        Tokenizer.from_directory(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'{"version": "1.0"}',
        b'{"model": {"type": "X"}}',
    ],
)
def test_a_corrupt_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_directory(tmp_path)


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    whole = checkpoints.byte_tokenizer().to_str()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2], encoding="utf-8")
    with pytest.raises(TokenizerError, match="is not a tokenizer"):
        Tokenizer.from_directory(tmp_path)


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path: Path) -> None:
    checkpoints.byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"ids up to 258; the model's vocab_size is 258"):
        Tokenizer.for_model(tmp_path, tiny.llama(vocab_size=258))
    for vocab_size in (259, 300):
        tokenizer = Tokenizer.for_model(tmp_path, tiny.llama(vocab_size=vocab_size))
        assert tokenizer.vocab_size == 259


def test_vocabulary_size_counts_to_the_highest_id(tmp_path: Path) -> None:
    """Ids may have gaps, and added tokens may lie behind them."""
    content = json.loads(checkpoints.byte_tokenizer().to_str())
    content["added_tokens"][-1]["id"] = 400
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = Tokenizer.from_directory(tmp_path)
    highest = max(i for i in range(1000) if tokenizer.token_of(i) is not None)
    assert tokenizer.vocab_size == highest + 1


def test_settings_of_a_training_run_are_ignored(tmp_path: Path) -> None:
    backend = checkpoints.byte_tokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=8, pad_id=258, pad_token="<pad>")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert len(tokenizer.encode("hello")) == 5
    assert len(tokenizer.encode("h")) == 1


def test_special_tokens_are_added_unless_refused() -> None:
    assert llama().encode("a")[0] == 1
    assert llama().encode("a")[1:] == llama().encode("a", add_special_tokens=False)
    assert llama().token_of(1) == "<s>"
    assert llama().token_of(100_000) is None
    assert llama().decode([1, *llama().encode("a")[1:]]) == "a"
    assert llama().decode([1], skip_special_tokens=False) == "<s>"


@pytest.mark.parametrize("name", MAKERS)
@given(prompt=st.text(ALPHABET, min_size=1, max_size=8), text=st.text(ALPHABET, max_size=12))
@example(prompt="hello", text=" ab a")
def test_text_continues_its_prompt_with_the_space_between_them(
    name: str, prompt: str, text: str
) -> None:
    tokenizer = MAKERS[name]()
    before = tokenizer.encode(prompt)
    after = tokenizer.encode(prompt + text)
    if after[: len(before)] != before:
        return  # the text changes how the prompt is cut into tokens
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=before)
    streamed = detokenizer.push(after[len(before) :]) + detokenizer.flush()
    assert tokenizer.decode(before) + streamed == tokenizer.decode(after)
