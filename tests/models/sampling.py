"""Random logits, and rows with every option of the sampler."""

import math
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from models.sampler import SamplingRow

VOCAB = 23
JUST_BELOW_ONE = math.nextafter(1.0, 0.0)
INFINITY = float("inf")

temperatures = st.floats(0.05, 5.0)
seeds = st.integers(0, 2**16)
token_ids = st.integers(0, VOCAB - 1)


def logits_of(seed: int, num_rows: int = 1, vocab: int = VOCAB) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(num_rows, vocab, generator=generator)


@st.composite
def filters(draw: st.DrawFn) -> SamplingRow:
    return SamplingRow(
        temperature=draw(temperatures),
        top_k=draw(st.integers(0, VOCAB + 2)),
        top_p=draw(st.floats(0.01, 1.0)),
        min_p=draw(st.just(0.0) | st.floats(0.001, 1.0)),
    )


@st.composite
def any_rows(draw: st.DrawFn) -> SamplingRow:
    """All options together; suppressed tokens never cover all allowed ones."""
    row = draw(filters())
    return replace(
        row,
        temperature=draw(st.just(0.0) | temperatures),
        repetition_penalty=draw(st.just(1.0) | st.floats(0.2, 5.0)),
        presence_penalty=draw(st.just(0.0) | st.floats(-2.0, 2.0)),
        frequency_penalty=draw(st.just(0.0) | st.floats(-2.0, 2.0)),
        logit_bias=draw(st.dictionaries(token_ids, st.floats(-5.0, 5.0), max_size=4)),
        allowed_token_ids=draw(st.just([]) | st.lists(token_ids, min_size=4, unique=True)),
        suppressed_token_ids=draw(st.lists(token_ids, max_size=3)),
        prompt_token_ids=draw(st.lists(token_ids, max_size=6)),
        output_token_ids=draw(st.lists(token_ids, max_size=6)),
        uniform=draw(st.floats(0.0, 1.0, exclude_max=True)),
        num_logprobs=draw(st.none() | st.integers(0, 5)),
    )
