"""With the operations in C++, what a model says of a sequence has the same bits whatever is beside
it, however its prompt is cut, and on how many threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import HeadConfig
from models.positions import RopeConfig
from tests.models import tiny
from tests.models.cpu.units import UNITS, multiplying_by
from tests.models.kernels import needs_library

pytestmark = needs_library

# Whole tiles of a matrix unit, and less than one; few queries for each key/value head, and many.
CONFIG = tiny.llama(
    hidden_size=32,
    intermediate_size=48,
    vocab_size=64,
    layers=(
        HeadConfig(4, 2, 48, rope=RopeConfig(10_000.0, 8)),
        HeadConfig(4, 1, 16, window=9, rope=RopeConfig(10_000.0, 8)),
        HeadConfig(6, 6, 32, rope=RopeConfig(10_000.0, 8)),
    ),
)


@pytest.mark.parametrize(
    ("unit", "dtype"),
    [("vectors", torch.float32), *((unit, torch.bfloat16) for unit in UNITS)],
)
@settings(max_examples=25, deadline=None)
@given(
    mates=st.lists(st.integers(1, 40), max_size=4),
    cuts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    threads=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 2**16),
)
def test_logits_of_a_sequence_are_its_own(
    unit: str,
    dtype: torch.dtype,
    mates: list[int],
    cuts: list[int],
    threads: int,
    seed: int,
) -> None:
    model = tiny.model(CONFIG, dtype=dtype)
    model.pack_weights(batch_invariant=True)
    generator = torch.Generator().manual_seed(seed)
    length = sum(cuts)
    tokens = torch.randint(0, 64, (length,), generator=generator)
    with multiplying_by(unit):
        (alone,) = tiny.paged_logits(model, [tokens], [[length]])
    others = [torch.randint(0, 64, (mate,), generator=generator) for mate in mates]
    # The others are fed one token at a time, and what is left of them in the last step.
    steps = [[cut, *(min(1, max(0, mate - at)) for mate in mates)] for at, cut in enumerate(cuts)]
    for index, mate in enumerate(mates, start=1):
        steps[-1][index] = mate - sum(step[index] for step in steps[:-1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with multiplying_by(unit):
            together, *_ = tiny.paged_logits(model, [tokens, *others], steps)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)
