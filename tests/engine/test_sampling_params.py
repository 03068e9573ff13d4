"""Sampling settings: nothing is changed unless it is asked for, and nothing changes later."""

import dataclasses

import pytest

from models.sampler import SamplingRow
from service.engine.sampling_params import SamplingParams

OFF = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


@pytest.mark.parametrize("field", OFF)
def test_defaults_are_those_of_the_sampler(field: str) -> None:
    assert getattr(SamplingParams(), field) == getattr(SamplingRow(), field)


def test_defaults_leave_the_distribution_of_the_model_alone() -> None:
    row = SamplingRow(**{field: getattr(SamplingParams(), field) for field in OFF})
    assert not row.edits_logits
    assert not row.filters


def test_two_requests_do_not_share_their_logit_bias() -> None:
    assert SamplingParams().logit_bias is not SamplingParams().logit_bias


def test_settings_do_not_change_once_made() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(("max_tokens", "expected"), [(None, 5), (1, 5), (4, 8)])
def test_the_last_token_of_a_generation_needs_no_cache_slot(
    max_tokens: int | None, expected: int
) -> None:
    assert SamplingParams(max_tokens=max_tokens).max_kv_tokens(5) == expected
