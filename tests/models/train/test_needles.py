"""Needles lie where a row says that they do."""

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.train.needles import NUM_NEEDLES, VALUES, needle_row
from models.train.rows import Rows


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer, tokens: Tensor) -> Rows:
    return Rows(tokens, tokenizer, seed=0, repeat_share=0.0, needle_share=0.0)


def ids_of(ids: Tensor, start: int, length: int) -> list[int]:
    return ids[start : start + length].tolist()


def test_each_answer_is_found_before(tokenizer: Tokenizer, rows: Rows) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        row = needle_row(tokenizer, 257, rows.text, generator)
        assert row is not None
        assert len(row.ids) == 257
        assert len(row.answers) == NUM_NEEDLES
        for answer in row.answers:
            said = ids_of(row.ids, answer.start, answer.length)
            assert ids_of(row.ids, answer.found, answer.length) == said
            assert tokenizer.decode(said).strip() in VALUES
            # The question too: what is before both is the same key.
            before = [ids_of(row.ids, place - 4, 4) for place in (answer.start, answer.found)]
            assert before[0] == before[1]
            assert answer.found + answer.length < answer.start
        known = [i for a in row.answers for i in range(a.start, a.start + a.length)]
        assert row.known.nonzero().flatten().tolist() == sorted(known)


def test_a_short_row_has_no_room(tokenizer: Tokenizer, rows: Rows) -> None:
    assert needle_row(tokenizer, 33, rows.text, torch.Generator().manual_seed(0)) is None
