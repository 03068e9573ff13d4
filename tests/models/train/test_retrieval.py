"""Answers count as right where all their tokens are, and heads by where they look."""

import math
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.config import HeadConfig
from models.positions import RopeConfig
from models.train import retrieval
from models.train.needles import NUM_NEEDLES, NeedleRow, needle_row
from models.train.retrieval import Retrieval, measure_retrieval
from models.transformer import Transformer, random_model
from tests.models import tiny

NUM_ANSWERS = 64 * NUM_NEEDLES


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    vocab_size = tokenizer.get_vocab_size()
    config = tiny.llama(vocab_size=vocab_size, max_position_embeddings=1024)
    return random_model(config, seed=0).requires_grad_(False)


def measured(model: Transformer, tokenizer: Tokenizer, tokens: Tensor) -> Retrieval:
    found = measure_retrieval(model, tokenizer, tokens, seed=1)
    assert found is not None
    return found


def test_an_untrained_model_finds_nothing(
    model: Transformer, tokenizer: Tokenizer, tokens: Tensor
) -> None:
    found = measured(model, tokenizer, tokens)
    assert (found.row_tokens, found.num_answers) == (256, NUM_ANSWERS)
    assert found.accuracy < 0.1
    assert found.loss > 0.9 * math.log(model.config.vocab_size)
    assert found.best.score < 0.1


def test_a_model_that_knows_the_answers_is_right(
    model: Transformer, tokenizer: Tokenizer, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and weights are planted: a head that looks at the needle, and what comes next; the
    first answer of each row is wrong in its last token."""
    made: list[NeedleRow] = []

    def remember(*arguments: object) -> NeedleRow | None:
        row = needle_row(*arguments)  # type: ignore[arg-type]
        assert row is not None
        made.append(row)
        return row

    def logits(ids: Tensor) -> Tensor:
        likely = torch.full((*ids.shape, tokenizer.get_vocab_size()), -100.0)
        for number, row in enumerate(rows_of(ids)):
            likely[number].scatter_(1, row.ids[1:, None], 100.0)
            wrong = row.answers[0].start + row.answers[0].length - 2
            likely[number, wrong, row.ids[wrong + 1]] = 95.0
            likely[number, wrong, 0] = 100.0
        return likely

    def weights(_: Transformer, ids: Tensor) -> list[Tensor]:
        looks = torch.zeros(len(ids), 3, ids.shape[1], ids.shape[1])
        for number, row in enumerate(rows_of(ids)):
            for answer in row.answers:
                looks[number, 1, answer.start - 1, answer.found] = 0.75
                looks[number, 2, answer.start - 1, answer.found - 1] = 1.0
                looks[number, 2, answer.start - 2, answer.found] = 1.0
        return [torch.zeros(len(ids), 4, *ids.shape[1:], ids.shape[1]), looks]

    def rows_of(ids: Tensor) -> Sequence[NeedleRow]:
        return [next(r for r in made if torch.equal(r.ids[:-1], row)) for row in ids]

    layers = model.config.layers[0], HeadConfig(3, 1, 8, rope=RopeConfig(10_000.0, 8))
    planted = random_model(model.config.replace(layers=layers), seed=0)
    monkeypatch.setattr(retrieval, "needle_row", remember)
    monkeypatch.setattr(retrieval, "attention_weights", weights)
    monkeypatch.setattr(planted, "logits", logits)
    found = measured(planted, tokenizer, tokens)
    assert len(made) == 64
    assert found.accuracy == 1 - 1 / NUM_NEEDLES
    assert found.loss == pytest.approx(5.0 / NUM_NEEDLES, rel=1e-2)
    assert (found.best.layer, found.best.head) == (1, 1)
    assert found.best.score == pytest.approx(0.75)


def test_without_room_nothing_is_measured(
    model: Transformer, tokenizer: Tokenizer, tokens: Tensor
) -> None:
    short = random_model(model.config.replace(max_position_embeddings=64), seed=0)
    assert measure_retrieval(short, tokenizer, tokens, seed=1) is None
    assert measure_retrieval(model, tokenizer, tokens[:200], seed=1) is None
