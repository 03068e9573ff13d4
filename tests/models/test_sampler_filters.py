"""Temperature, top_k, top_p and min_p keep the tokens that transformers' processors keep."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.sampler import SamplingRow, filtered_probabilities
from tests.models.sampling import filters, logits_of, seeds


def their_probabilities(logits: Tensor, row: SamplingRow) -> Tensor:
    chain = LogitsProcessorList([TemperatureLogitsWarper(row.temperature)])
    if row.top_k:
        chain.append(TopKLogitsWarper(row.top_k))
    if row.top_p < 1.0:
        chain.append(TopPLogitsWarper(row.top_p))
    if row.min_p:
        chain.append(MinPLogitsWarper(row.min_p))
    processed: Tensor = chain(torch.zeros(len(logits), 1, dtype=torch.int64), logits)
    return processed.softmax(dim=-1)


@settings(max_examples=300)
@given(rows=st.lists(filters(), min_size=1, max_size=4), seed=seeds)
def test_filters_equal_the_processor_chain_of_transformers(
    rows: list[SamplingRow], seed: int
) -> None:
    logits = logits_of(seed, len(rows))
    probabilities = filtered_probabilities(logits.clone(), rows)
    assert probabilities.dtype == torch.float32
    for ours, row, own_logits in zip(probabilities, rows, logits, strict=True):
        expected = their_probabilities(own_logits[None], row)[0]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(ours > 1e-6, expected > 1e-6)


def test_each_filter_alone_keeps_what_its_definition_says() -> None:
    probabilities = torch.tensor([[0.4, 0.1, 0.3, 0.05, 0.15]])

    def kept(**options: float) -> list[int]:
        row = SamplingRow(**options)  # type: ignore[arg-type]
        return filtered_probabilities(probabilities.log(), [row])[0].nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 2]
    assert kept(top_k=5) == kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.6) == [0, 2]
    assert kept(top_p=0.75) == [0, 2, 4], "the smallest set that reaches it"
    assert kept(top_p=1e-9) == [0], "the most likely token always stays"
    assert kept(min_p=0.3) == [0, 2, 4], "less likely than 0.3 * 0.4 goes"
    assert kept(min_p=1.0) == [0]
    # top_k comes first: of 0.4 and 0.3 alone, the first has 57 %.
    assert kept(top_k=2, top_p=0.55) == [0]
    # Temperature comes first: at 0.25 the first token has 75 %.
    assert kept(top_p=0.7, temperature=0.25) == [0]


def test_equally_likely_tokens_share_top_k_as_in_transformers() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    ours = filtered_probabilities(logits.clone(), [SamplingRow(top_k=2)])
    assert torch.equal(ours > 0, torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(ours, their_probabilities(logits, SamplingRow(top_k=2)))
