"""A row of a batch knows nothing of the others, whatever they hold."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.sampler import SampledToken, SamplingRow, sample
from tests.models.sampling import INFINITY, VOCAB, any_rows, logits_of, seeds


def assert_same(together: Sequence[SampledToken], alone: Sequence[SampledToken]) -> None:
    for ours, expected in zip(together, alone, strict=True):
        assert ours.token_id == expected.token_id
        assert ours.logprob == pytest.approx(expected.logprob, abs=1e-6)
        assert [i for i, _ in ours.top_logprobs] == [i for i, _ in expected.top_logprobs]
        assert [p for _, p in ours.top_logprobs] == pytest.approx(
            [p for _, p in expected.top_logprobs], abs=1e-6
        )


@settings(max_examples=100)
@given(rows=st.lists(any_rows(), min_size=2, max_size=8), seed=seeds)
def test_batch_mates_change_nothing(rows: list[SamplingRow], seed: int) -> None:
    logits = logits_of(seed, len(rows))
    alone = [sample(logits[i : i + 1].clone(), [row])[0] for i, row in enumerate(rows)]
    assert_same(sample(logits.clone(), rows), alone)
    assert_same(sample(logits.flip(0), rows[::-1]), alone[::-1])


@pytest.mark.parametrize("vocab", [33, 50_257])
def test_batch_mates_change_nothing_in_a_large_vocabulary(vocab: int) -> None:
    rows = [
        SamplingRow(temperature=t, top_k=k, top_p=p, uniform=u, num_logprobs=3)
        for t, k, p, u in [
            (1.0, 0, 1.0, 0.3),
            (0.7, 50, 0.9, 0.8),
            (0.0, 0, 1.0, 0.0),
            (1.3, 0, 0.95, 0.99),
        ]
    ]
    logits = logits_of(0, len(rows), vocab)
    alone = [sample(logits[i : i + 1].clone(), [row])[0] for i, row in enumerate(rows)]
    assert_same(sample(logits.clone(), rows), alone)


@pytest.mark.parametrize(
    "broken",
    [
        torch.full((VOCAB,), float("nan")),
        torch.full((VOCAB,), -INFINITY),
        torch.zeros(VOCAB).index_fill(0, torch.tensor([7]), float("nan")),
        torch.zeros(VOCAB).index_fill(0, torch.tensor([7]), INFINITY),
    ],
    ids=["all nan", "all -inf", "one nan", "one inf"],
)
@settings(max_examples=40)
@given(rows=st.lists(any_rows(), min_size=3, max_size=3), at=st.integers(0, 2), seed=seeds)
def test_a_broken_row_has_no_token_and_harms_no_other(
    broken: Tensor, rows: list[SamplingRow], at: int, seed: int
) -> None:
    logits = logits_of(seed, 3)
    expected = sample(logits.clone(), rows)
    logits[at] = broken
    expected[at] = SampledToken(None)
    assert_same(sample(logits, rows), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_logprobs", [None, 1])
@pytest.mark.parametrize(
    "row",
    [
        SamplingRow(allowed_token_ids=[3, 4], suppressed_token_ids=[4, 3]),
        SamplingRow(suppressed_token_ids=range(VOCAB)),
    ],
    ids=["all allowed are suppressed", "all suppressed"],
)
def test_a_row_whose_edits_leave_no_choice_has_no_token_and_harms_no_other(
    row: SamplingRow, num_logprobs: int | None, temperature: float
) -> None:
    """Nothing can be chosen, so nothing is: neither a suppressed id nor one past the vocabulary."""
    rows = [
        replace(row, temperature=temperature, num_logprobs=num_logprobs, uniform=0.5),
        SamplingRow(uniform=0.5, num_logprobs=2),
    ]
    logits = logits_of(0, 2)
    other = sample(logits[1:].clone(), rows[1:])
    assert_same(sample(logits, rows), [SampledToken(None), *other])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_penalty_that_overflows_float32_gives_no_impossible_token(
    top_p: float, temperature: float
) -> None:
    row = SamplingRow(
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=1e-42,
        prompt_token_ids=range(VOCAB),
        uniform=0.5,
        num_logprobs=1,
    )
    (token,) = sample(logits_of(0), [row])
    assert token.token_id is None or 0 <= token.token_id < VOCAB


def test_an_empty_batch_gives_no_tokens() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []
