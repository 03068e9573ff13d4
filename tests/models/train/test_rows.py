"""Rows are decided by seed and step; what they say can be predicted, can be."""

import re

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.train.rows import IGNORED, Rows, ordinary_tokens, repeated
from models.train.tokenizer import BOS, SPECIAL_TOKENS


def rows_of(
    tokenizer: Tokenizer,
    tokens: Tensor,
    *,
    seed: int = 0,
    repeats: float = 0.0,
    needles: float = 0.0,
) -> Rows:
    return Rows(tokens, tokenizer, seed, repeat_share=repeats, needle_share=needles)


def test_a_step_can_be_made_again(tokenizer: Tokenizer, tokens: Tensor) -> None:
    rows = rows_of(tokenizer, tokens, seed=3, repeats=0.1)
    first = rows.at(5, 8, 64)
    torch.manual_seed(1)
    again = rows_of(tokenizer, tokens, seed=3, repeats=0.1).at(5, 8, 64)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (
        rows.at(6, 8, 64),
        rows_of(tokenizer, tokens, seed=4, repeats=0.1).at(5, 8, 64),
    ):
        assert not torch.equal(first[0], other[0])


def test_text_is_a_window_behind_bos(tokenizer: Tokenizer, tokens: Tensor) -> None:
    inputs, targets = rows_of(tokenizer, tokens).at(0, 4, 32)
    everything = tokens.tolist()
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert row[0] == BOS
        assert row[1:] == target[:-1]
        assert any(everything[i : i + 32] == target for i in range(len(everything)))
    assert tokens[0] == BOS
    assert int((tokens == BOS).sum()) == 1, "the text itself stays as it is"


def test_repeats_can_be_predicted_from_one_period_before(
    tokenizer: Tokenizer, tokens: Tensor
) -> None:
    inputs, targets = rows_of(tokenizer, tokens, repeats=1.0).at(0, 16, 128)
    periods = set()
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        period = target.count(IGNORED)
        periods.add(period)
        assert 16 <= period <= 64
        assert target[:period] == [IGNORED] * period
        # Target i is what follows input i.
        assert target[period:] == row[1 : len(row) - period + 1]
        assert not set(row[1:]) & set(range(len(SPECIAL_TOKENS)))
    assert len(periods) > 5


@pytest.mark.parametrize(
    ("difficulty", "shortest", "longest"), [(0.0, 4, 24), (0.5, 8, 78), (1.0, 16, 256)]
)
def test_repetitions_become_harder(
    tokenizer: Tokenizer, tokens: Tensor, difficulty: float, shortest: int, longest: int
) -> None:
    rows = rows_of(tokenizer, tokens, repeats=1.0)
    ordinary = tokenizer.get_vocab_size() - len(SPECIAL_TOKENS)
    inputs, targets = rows.at(0, 200, 512, difficulty)
    assert len(inputs[:, 1:].unique()) == round(64 * (ordinary / 64) ** difficulty)
    periods = (targets == IGNORED).sum(dim=1)
    assert shortest <= int(periods.min()) < shortest + 5
    assert longest - 5 < int(periods.max()) <= longest
    harder, _ = rows.at(1, 200, 512)
    assert set(inputs.unique().tolist()) <= set(harder.unique().tolist()), "none goes again"


def test_needles_can_be_found(tokenizer: Tokenizer, tokens: Tensor) -> None:
    inputs, targets = rows_of(tokenizer, tokens, needles=1.0).at(0, 6, 256)
    for row, target in zip(inputs, targets, strict=True):
        ids = [*row.tolist(), int(target[-1])]
        assert ids[0] == BOS
        text = tokenizer.decode(ids)
        found = re.findall(r"\nkey (\d{4}) is ([a-z]+)", text)
        assert len(found) == 8
        assert sorted(found[:4]) == sorted(found[4:]), "each key has the same value twice"
        answers = tokenizer.decode(target[target != IGNORED].tolist())
        assert answers.split() == [value for _, value in found[4:]]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_shares_are_kept(tokenizer: Tokenizer, tokens: Tensor, share: float) -> None:
    rows = rows_of(tokenizer, tokens, repeats=share, needles=0.1)
    _, targets = rows.at(0, 2000, 32)
    masked = (targets == IGNORED).any(dim=1).float().mean()
    # Rows of 32 have no room for needles, which are text then.
    assert float(masked) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(("period", "num_tokens"), [(5, 10), (7, 20), (3, 3)])
def test_repeated_has_its_period(period: int, num_tokens: int) -> None:
    ids = repeated(3, period, num_tokens, ordinary_tokens(50), torch.Generator().manual_seed(0))
    assert ids.shape == (3, num_tokens + 1)
    assert (ids[:, 0] == BOS).all()
    assert torch.equal(ids[:, 1 + period :], ids[:, 1 : num_tokens + 1 - period])
    assert int(ids[:, 1:].min()) >= len(SPECIAL_TOKENS)
    assert int(ids.max()) < 50
