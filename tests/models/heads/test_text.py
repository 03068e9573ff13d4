"""Rows of text begin like prompts and are spread over all texts."""

import pytest

from models.errors import TokenizerError
from models.heads.text import text_batches
from models.tokenizer import Tokenizer
from models.train.tokenizer import BOS, train_tokenizer

TEXTS = [f"line {index} of a text\n" * 10 for index in range(20)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(TEXTS, 300))


def test_rows_begin_like_prompts_and_hold_the_text(tokenizer: Tokenizer) -> None:
    batches = text_batches(tokenizer, TEXTS, num_tokens=20 * 16, seq_len=16)
    rows = [row for batch in batches for row in batch.tolist()]
    assert [len(batch) for batch in batches] == [8, 8, 4]
    everything = "".join(TEXTS)
    starts = []
    for row in rows:
        assert len(row) == 16
        assert row[0] == BOS
        starts.append(everything.index(tokenizer.decode(row)))
    assert max(starts) > 0.9 * len(everything)


def test_short_texts_are_used_up_and_too_short_ones_refused(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[0], add_special_tokens=False)
    (batch,) = text_batches(tokenizer, TEXTS[:1], num_tokens=10_000, seq_len=len(ids) // 2 + 1)
    assert batch.tolist() == [
        [BOS, *ids[: len(ids) // 2]],
        [BOS, *ids[len(ids) // 2 : 2 * (len(ids) // 2)]],
    ]
    with pytest.raises(TokenizerError, match=rf"the text has {len(ids)} tokens; allowed: 511 or"):
        text_batches(tokenizer, TEXTS[:1], num_tokens=10, seq_len=512)
