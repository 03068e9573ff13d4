"""Text ends before a stop string, and no part of the stop string is ever emitted."""

import functools
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tokenizer import IncrementalDetokenizer
from tests.models.text_tokenizers import REPLACEMENT, byte_level, llama, stream

# Few letters, so that stop strings overlap with the text, each other and themselves.
_STOP_TOKENS = ("a", "b", "ab", "ba", "aab", "bb", "é", "<0xE2>", "<0x82>", "<0xAC>", "</s>")
stops = st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3)


@functools.cache
def stop_token_ids() -> tuple[int, ...]:
    by_token = {llama().token_of(i): i for i in range(llama().vocab_size)}
    return tuple(by_token[token] for token in _STOP_TOKENS)


@st.composite
def generations(draw: st.DrawFn) -> list[int]:
    """Token ids whose text often contains stop strings, within a token and across several."""
    euro = stop_token_ids()[-4:-1]
    parts = draw(
        st.lists(st.sampled_from([*((i,) for i in stop_token_ids()), euro, euro]), max_size=10)
    )
    # A lone continuation byte is not text; the unfinished character at the end may stay.
    ids = [token_id for part in parts for token_id in part]
    text = llama().decode(ids)
    return ids if REPLACEMENT not in text.rstrip(REPLACEMENT) else [i for i in ids if i not in euro]


def searched(
    pieces: Sequence[str], rest: str, stop: Sequence[str], min_tokens: int
) -> tuple[str, set[str]]:
    """The definition: text up to the earliest stop string that any token completes.

    Returns:
        The text, and the stop strings that may be named: those found at that place.
    """
    unsearched = "".join(pieces[:min_tokens])
    if len(pieces) <= min_tokens:
        return unsearched + rest, set()
    text = ""
    for piece in (*pieces[min_tokens:], rest):
        text += piece
        found = {s: text.index(s) for s in stop if s in text}
        if found:
            place = min(found.values())
            return unsearched + text[:place], {s for s, at in found.items() if at == place}
    return unsearched + text, set()


@settings(max_examples=500)
@given(token_ids=generations(), stop=stops, min_tokens=st.just(0) | st.integers(0, 6))
def test_text_ends_before_the_earliest_stop_string(
    token_ids: list[int], stop: list[str], min_tokens: int
) -> None:
    plain_pieces, plain_rest, _ = stream(llama(), token_ids)
    expected, names = searched(plain_pieces, plain_rest, stop, min_tokens)
    pieces, rest, matched = stream(llama(), token_ids, stop, min_tokens)
    assert "".join(pieces) + rest == expected
    assert matched in names if names else matched is None


@settings(max_examples=500)
@given(token_ids=generations(), stop=stops)
def test_only_what_may_become_a_stop_string_is_held_back(
    token_ids: list[int], stop: list[str]
) -> None:
    plain_pieces, _, _ = stream(llama(), token_ids)
    detokenizer = IncrementalDetokenizer(llama(), stop)
    emitted = ""
    for index, token_id in enumerate(token_ids):
        emitted += detokenizer.push([token_id])
        if detokenizer.matched_stop is not None:
            break
        known = "".join(plain_pieces[: index + 1])
        assert known.startswith(emitted)
        held = known.removeprefix(emitted)
        assert not held or any(s.startswith(held) and s != held for s in stop)


@settings(max_examples=300)
@given(
    token_ids=generations(),
    stop=stops,
    min_tokens=st.integers(0, 4),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_grouping_of_tokens_changes_nothing(
    token_ids: list[int], stop: list[str], min_tokens: int, cuts: list[int]
) -> None:
    pieces, rest, matched = stream(llama(), token_ids, stop, min_tokens)
    grouped = IncrementalDetokenizer(llama(), stop, min_tokens=min_tokens)
    bounds = [0, *sorted(cuts), len(token_ids)]
    text = "".join(grouped.push(token_ids[start:end]) for start, end in itertools.pairwise(bounds))
    assert text == "".join(pieces)
    assert grouped.flush() == rest
    assert grouped.matched_stop == matched


def bytes_of(text: str) -> list[int]:
    return byte_level().encode(text)


@pytest.mark.parametrize(
    ("text", "stop", "shown", "matched"),
    [
        ("hello END world", ["END"], "hello ", "END"),
        ("hello", ["END"], "hello", None),
        ("hello EN", ["END"], "hello EN", None),
        ("END", ["END"], "", "END"),
        ("aaab", ["aab"], "a", "aab"),
        ("ababac", ["abac"], "ab", "abac"),
        ("xaby", ["b", "abc"], "xa", "b"),
        ("xabcy", ["c", "abd"], "xab", "c"),
        ("x\n\ny", ["\n\n"], "x", "\n\n"),
        ("5 € or 6 €", ["€"], "5 ", "€"),
        ("one two", ["two", "one"], "", "one"),
    ],
)
def test_stop_strings_split_over_tokens(
    text: str, stop: list[str], shown: str, matched: str | None
) -> None:
    pieces, rest, met = stream(byte_level(), bytes_of(text), stop)
    assert ("".join(pieces) + rest, met) == (shown, matched)


def test_nothing_is_emitted_after_a_stop_string() -> None:
    detokenizer = IncrementalDetokenizer(byte_level(), ["!"])
    assert detokenizer.push(bytes_of("hi! there")) == "hi"
    assert detokenizer.matched_stop == "!"
    assert detokenizer.push(bytes_of("more")) == ""
    assert detokenizer.flush() == ""
    assert detokenizer.matched_stop == "!"


def test_a_stop_string_in_the_flushed_text_counts() -> None:
    """Bytes that never became a character are text once the sequence ends."""
    detokenizer = IncrementalDetokenizer(byte_level(), [REPLACEMENT])
    assert detokenizer.push([*bytes_of("ok"), *bytes_of("€")[:2]]) == "ok"
    assert detokenizer.matched_stop is None
    assert detokenizer.flush() == ""
    assert detokenizer.matched_stop == REPLACEMENT


@pytest.mark.parametrize(
    ("min_tokens", "shown", "matched"),
    [(0, "", "."), (1, ".a", "."), (2, ".a", "."), (3, ".a.", "."), (4, ".a..b", None)],
)
def test_stop_strings_do_not_count_in_the_first_tokens(
    min_tokens: int, shown: str, matched: str | None
) -> None:
    pieces, rest, met = stream(byte_level(), bytes_of(".a..b"), ["."], min_tokens)
    assert ("".join(pieces) + rest, met) == (shown, matched)


def test_a_stop_string_that_begins_in_the_first_tokens_does_not_count() -> None:
    pieces, rest, met = stream(byte_level(), bytes_of("xEND"), ["END"], min_tokens=2)
    assert ("".join(pieces) + rest, met) == ("xEND", None)
