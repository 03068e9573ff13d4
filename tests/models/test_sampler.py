"""Draws and edits against the inverted distribution function, NumPy and transformers."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from models.sampler import SamplingRow, _filtered_weights, filtered_probabilities, sample
from tests.models.numpy_oracle import Array
from tests.models.sampling import (
    INFINITY,
    JUST_BELOW_ONE,
    VOCAB,
    any_rows,
    filters,
    logits_of,
    seeds,
    temperatures,
    token_ids,
)

# --- the draw ----------------------------------------------------------------------------------


def assert_drawn_from(
    logits: Tensor, row: SamplingRow, edited: Array, *, num_draws: int = 40
) -> None:
    """Each draw at a fixed uniform number inverts the distribution function of `edited`."""
    powers = np.exp((edited - edited.max()) / row.temperature)
    cumulative = np.concatenate(([0.0], (powers / powers.sum()).cumsum()))
    uniforms = [(i + 0.5) / num_draws for i in range(num_draws)]
    rows = [replace(row, uniform=uniform) for uniform in uniforms]
    drawn = sample(logits.repeat(num_draws, 1), rows)
    for token, uniform in zip(drawn, uniforms, strict=True):
        assert token.token_id is not None
        assert powers[token.token_id] > 0
        # Float32 may put a number that is this close to a boundary on its other side.
        assert cumulative[token.token_id] - 1e-6 <= uniform <= cumulative[token.token_id + 1] + 1e-6


@pytest.mark.parametrize("num_draws", [1000, 4093])
def test_frequencies_match_probabilities(num_draws: int) -> None:
    probabilities = torch.tensor([0.05, 0.3, 0.0, 0.125, 0.5, 0.025])
    rows = [SamplingRow(uniform=(i + 0.5) / num_draws) for i in range(num_draws)]
    tokens = sample(probabilities.log().repeat(num_draws, 1), rows)
    counts = Counter(token.token_id for token in tokens)
    assert counts.total() == num_draws
    for token_id, probability in enumerate(probabilities.tolist()):
        assert abs(counts[token_id] - num_draws * probability) <= 1
    assert counts[2] == 0


@settings(max_examples=100)
@given(row=filters(), seed=seeds, uniform=st.floats(0.0, 1.0, exclude_max=True))
def test_the_drawn_token_is_where_the_distribution_passes_the_uniform_number(
    row: SamplingRow, seed: int, uniform: float
) -> None:
    logits = logits_of(seed)
    weights = _filtered_weights(logits.clone(), [row])[0].double()  # not rounded once more
    (token,) = sample(logits, [replace(row, uniform=uniform)])
    assert token.token_id is not None
    assert weights[token.token_id] > 0
    cumulative = weights.cumsum(dim=0) / weights.sum()
    below = float(cumulative[token.token_id - 1]) if token.token_id else 0.0
    assert below - 1e-12 <= uniform <= float(cumulative[token.token_id]) + 1e-12


@settings(max_examples=50)
@given(seed=seeds, vocab=st.sampled_from([2, VOCAB, 1000]), temperature=temperatures)
def test_neighbouring_uniform_numbers_fall_on_the_right_side_of_a_boundary(
    seed: int, vocab: int, temperature: float
) -> None:
    row = SamplingRow(temperature=temperature)
    logits = logits_of(seed, vocab=vocab)
    weights = _filtered_weights(logits.clone(), [row])[0].double()  # not rounded once more
    token_id = seed % (vocab - 1)
    boundary = float(weights[: token_id + 1].sum() / weights.sum())
    # Wider than float64 rounds, far narrower than float32.
    sides = [replace(row, uniform=boundary + side) for side in (-1e-12, 1e-12)]
    first, second = (token.token_id for token in sample(logits.repeat(2, 1), sides))
    assert first is not None
    assert second is not None
    if 1e-11 < boundary < 1 - 1e-11:
        assert first <= token_id < second


@settings(max_examples=100)
@given(row=filters(), seed=seeds, vocab=st.sampled_from([1, 2, 5, VOCAB, 1000]))
@pytest.mark.parametrize("uniform", [0.0, 5e-324, JUST_BELOW_ONE])
def test_extreme_uniform_numbers_give_possible_tokens(
    uniform: float, row: SamplingRow, seed: int, vocab: int
) -> None:
    logits = logits_of(seed, vocab=vocab)
    # The first and last tokens have no probability at all.
    if vocab > 2:
        logits[0, 0] = logits[0, -1] = -INFINITY
    probabilities = filtered_probabilities(logits.clone(), [row])[0]
    (token,) = sample(logits, [replace(row, uniform=uniform)])
    assert token.token_id is not None
    assert 0 <= token.token_id < vocab
    assert probabilities[token.token_id] > 0


@settings(max_examples=50)
@given(row=any_rows(), seed=seeds)
def test_the_same_row_gives_the_same_token(row: SamplingRow, seed: int) -> None:
    assert sample(logits_of(seed), [row]) == sample(logits_of(seed), [row])


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-60, 5e-324])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"logit_bias": {4: 1.0}}]
)
def test_tiny_temperatures_are_greedy(temperature: float, options: dict[str, object]) -> None:
    # Rows of very different height: each is scaled from its own maximum.
    logits = logits_of(5, num_rows=3) + torch.tensor([[0.0], [1000.0], [-50.0]])
    greedy = SamplingRow(temperature=0, **options)  # type: ignore[arg-type]
    warm = [replace(greedy, temperature=temperature, uniform=u) for u in (0.0, 0.5, JUST_BELOW_ONE)]
    assert sample(logits.clone(), warm) == sample(logits.clone(), [greedy] * 3)


# --- greedy and edits --------------------------------------------------------------------------


@given(seed=seeds, num_rows=st.integers(1, 5))
def test_temperature_zero_takes_the_most_likely_token(seed: int, num_rows: int) -> None:
    logits = logits_of(seed, num_rows)
    # Filters and the uniform number have no say.
    row = SamplingRow(temperature=0, top_k=3, top_p=0.5, min_p=0.1, uniform=0.99)
    chosen = [token.token_id for token in sample(logits.clone(), [row] * num_rows)]
    assert chosen == logits.argmax(dim=-1).tolist()


@settings(max_examples=100)
@given(
    seed=seeds,
    penalty=st.floats(0.2, 5.0),
    prompt=st.lists(token_ids, min_size=1, max_size=8),
    output=st.lists(token_ids, max_size=8),
    temperature=temperatures,
)
def test_repetition_penalty_equals_transformers(
    seed: int, penalty: float, prompt: list[int], output: list[int], temperature: float
) -> None:
    logits = logits_of(seed)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([[*prompt, *output]]), logits)[0]
    row = SamplingRow(
        temperature=temperature,
        repetition_penalty=penalty,
        prompt_token_ids=prompt,
        output_token_ids=output,
    )
    assert_drawn_from(logits, row, expected.double().numpy())
    (token,) = sample(logits.clone(), [replace(row, temperature=0)])
    assert token.token_id == int(expected.argmax())


def edited_by_hand(logits: Tensor, row: SamplingRow) -> Array:
    """The documented order, written as loops: allowed, suppressed, bias, then penalties."""
    edited = logits.double().numpy().copy()
    for token_id in range(len(edited)):
        if row.allowed_token_ids and token_id not in row.allowed_token_ids:
            edited[token_id] = -np.inf
        if token_id in row.suppressed_token_ids:
            edited[token_id] = -np.inf
        edited[token_id] += row.logit_bias.get(token_id, 0.0)
        if token_id in {*row.prompt_token_ids, *row.output_token_ids}:
            if edited[token_id] > 0:
                edited[token_id] /= row.repetition_penalty
            else:
                edited[token_id] *= row.repetition_penalty
        count = list(row.output_token_ids).count(token_id)
        edited[token_id] -= row.presence_penalty * (count > 0) + row.frequency_penalty * count
    return edited


@settings(max_examples=200)
@given(row=any_rows(), temperature=temperatures, seed=seeds)
def test_all_edits_together_equal_numpy(row: SamplingRow, temperature: float, seed: int) -> None:
    logits = logits_of(seed)
    unfiltered = replace(row, temperature=temperature, top_k=0, top_p=1.0, min_p=0.0)
    assert_drawn_from(logits, unfiltered, edited_by_hand(logits[0], row), num_draws=10)


def test_each_edit_alone_does_what_its_definition_says() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, -1.0]])

    def greedy(**options: object) -> int | None:
        row = SamplingRow(temperature=0, **options)  # type: ignore[arg-type]
        return sample(logits.clone(), [row])[0].token_id

    assert greedy() == 0
    assert greedy(allowed_token_ids=[3, 2]) == 2
    assert greedy(suppressed_token_ids=[0, 1]) == 2
    assert greedy(allowed_token_ids=[0, 3], suppressed_token_ids=[0]) == 3
    assert greedy(logit_bias={3: 5.5}) == 3
    assert greedy(logit_bias={3: 4.5}) == 0
    # Once for presence, however often the token occurred; once per occurrence for frequency.
    assert greedy(presence_penalty=0.9, output_token_ids=[0, 0]) == 0
    assert greedy(presence_penalty=1.1, output_token_ids=[0, 0]) == 1
    assert greedy(frequency_penalty=0.4, output_token_ids=[0, 0]) == 0
    assert greedy(frequency_penalty=0.6, output_token_ids=[0, 0]) == 1
    # The prompt counts for repetition only.
    assert greedy(presence_penalty=2.0, frequency_penalty=2.0, prompt_token_ids=[0]) == 0
    assert greedy(repetition_penalty=1.5, prompt_token_ids=[0]) == 1
    assert greedy(repetition_penalty=1.5, output_token_ids=[0]) == 1
    assert greedy(repetition_penalty=5.0, prompt_token_ids=[0, 1, 2, 3]) == 0


# --- log-probabilities -------------------------------------------------------------------------


@settings(max_examples=100)
@given(row=any_rows(), num_logprobs=st.integers(0, VOCAB), seed=seeds)
def test_logprobs_are_the_models_own(row: SamplingRow, num_logprobs: int, seed: int) -> None:
    logits = logits_of(seed)
    expected = logits[0].double().log_softmax(dim=-1)
    (token,) = sample(logits, [replace(row, num_logprobs=num_logprobs)])
    assert token.token_id is not None
    assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-5)
    values, order = expected.topk(num_logprobs)
    assert [token_id for token_id, _ in token.top_logprobs] == order.tolist()
    assert [value for _, value in token.top_logprobs] == pytest.approx(values.tolist(), abs=1e-5)


def test_logprobs_are_reported_only_to_rows_that_ask() -> None:
    rows = [SamplingRow(num_logprobs=count) for count in (None, 0, 2, None)]
    tokens = sample(logits_of(0, 4), rows)
    assert [token.logprob is None for token in tokens] == [True, False, False, True]
    assert [len(token.top_logprobs) for token in tokens] == [0, 0, 2, 0]
