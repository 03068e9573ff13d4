"""Who sees whom, and which biases are added, against loops and against transformers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_alibi
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_alibi
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor as mpt_alibi

from models.positions import Alibi, alibi_slopes, mpt_alibi_slopes
from models.scoring import Scoring
from tests.models import numpy_oracle

HEAD_COUNTS = (1, 2, 3, 6, 8, 12, 71)
SIZES = st.none() | st.integers(1, 12)


def positions_of(*numbers: int) -> Tensor:
    return torch.tensor([numbers])


@given(
    queries=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    keys=st.lists(st.integers(-1, 20), min_size=1, max_size=24),
    window=SIZES | st.lists(SIZES, min_size=3, max_size=3).map(tuple),
    sink_tokens=st.integers(0, 4),
    causal=st.booleans(),
)
def test_what_is_visible_follows_the_definition(
    queries: list[int],
    keys: list[int],
    window: int | tuple[int | None, ...] | None,
    sink_tokens: int,
    causal: bool,
) -> None:
    """Keys stand in any order, as blocks do; -1 is padding."""
    scoring = Scoring(1.0, causal=causal, window=window, sink_tokens=sink_tokens)
    visible = scoring.visible(positions_of(*queries), positions_of(*keys))
    assert visible.shape[-2:] == (len(queries), len(keys))
    visible = visible.expand(1, 3, -1, -1)
    windows = window if isinstance(window, tuple) else (window,) * 3
    for head, size in enumerate(windows):
        for row, query in enumerate(queries):
            for column, key in enumerate(keys):
                expected = (
                    key >= 0
                    and (key <= query or not causal)
                    and numpy_oracle.in_window(query, key, size, sink_tokens)
                )
                assert bool(visible[0, head, row, column]) == expected


def test_a_window_counts_the_query_itself_and_sinks_come_on_top() -> None:
    """Written down by hand, so that the oracle is checked too."""
    keys = torch.arange(8)[None]
    assert Scoring(1.0, window=3).visible(positions_of(6), keys).flatten().tolist() == [
        *[False] * 4,
        *[True] * 3,
        False,
    ]
    assert Scoring(1.0, window=1).visible(positions_of(6), keys).sum() == 1
    sinking = Scoring(1.0, window=2, sink_tokens=2).visible(positions_of(6), keys)
    assert sinking.flatten().nonzero().flatten().tolist() == [0, 1, 5, 6]
    both_sides = Scoring(1.0, window=2, causal=False).visible(positions_of(3), keys)
    assert both_sides.flatten().nonzero().flatten().tolist() == [2, 3, 4]


@given(
    window=SIZES | st.lists(SIZES, min_size=2, max_size=2).map(tuple),
    causal=st.booleans(),
    sink_tokens=st.integers(0, 3),
    length=st.integers(1, 14),
)
def test_plain_means_that_causality_alone_decides(
    window: int | tuple[int | None, ...] | None, causal: bool, sink_tokens: int, length: int
) -> None:
    scoring = Scoring(1.0, causal=causal, window=window, sink_tokens=sink_tokens)
    positions = torch.arange(length)[None]
    lower = torch.ones(length, length, dtype=torch.bool).tril()
    if scoring.is_plain(length):
        assert (scoring.visible(positions, positions) == lower).all()
    elif causal and not sink_tokens:
        assert (scoring.visible(positions, positions) != lower).any()


def test_a_bias_is_never_plain() -> None:
    assert Scoring(1.0).is_plain(4)
    assert not Scoring(1.0, alibi=Alibi((0.5,))).is_plain(4)
    assert Scoring(1.0).bias(torch.arange(4)[None]) is None


# The largest of them is where 2^-8/n is no short binary number, and 300 where bfloat16 has lost
# whole positions.
@pytest.mark.parametrize("length", [1, 40, 300])
@pytest.mark.parametrize("num_heads", HEAD_COUNTS)
def test_biases_of_bloom_and_falcon_are_those_of_transformers(num_heads: int, length: int) -> None:
    mask = torch.ones(1, length, dtype=torch.int64)
    keys = torch.arange(length)[None]
    bloom = Scoring(1.0, alibi=Alibi(alibi_slopes(num_heads))).bias(keys)
    assert bloom is not None
    theirs = bloom_alibi(mask, num_heads, torch.float32).view(1, num_heads, 1, length)
    torch.testing.assert_close(bloom, theirs, rtol=1e-6, atol=0)
    falcon = Scoring(0.25, alibi=Alibi(alibi_slopes(num_heads), True, True)).bias(keys)
    assert falcon is not None
    theirs = falcon_alibi(mask, num_heads, torch.float32).view(1, num_heads, 1, length)
    assert torch.equal(falcon, theirs * 0.25), "rounded alike, and scaled with the scores"


@pytest.mark.parametrize("bias_max", [4, 8])
@pytest.mark.parametrize("num_heads", HEAD_COUNTS)
def test_biases_of_mpt_are_those_of_transformers_but_for_a_shift(
    num_heads: int, bias_max: int
) -> None:
    """Theirs count back from the last key; the softmax does not see the difference."""
    ours = Scoring(1.0, alibi=Alibi(mpt_alibi_slopes(num_heads, bias_max))).bias(
        torch.arange(40)[None]
    )
    assert ours is not None
    theirs = mpt_alibi(num_heads, 40, bias_max)
    torch.testing.assert_close(ours[0] - ours[0, ..., -1:], theirs, rtol=1e-5, atol=1e-6)


def test_biases_belong_to_positions_and_not_to_places() -> None:
    scoring = Scoring(1.0, alibi=Alibi((0.5, 0.25)))
    shuffled = scoring.bias(positions_of(9, 2, 5))
    assert shuffled is not None
    assert shuffled[0, :, 0].tolist() == [[4.5, 1.0, 2.5], [2.25, 0.5, 1.25]]


def test_a_bias_before_the_scale_is_scaled_in_each_head_alike() -> None:
    scale = torch.tensor([0.5, 2.0])
    bias = Scoring(scale, alibi=Alibi((1.0, 1.0), before_scale=True)).bias(positions_of(0, 3))
    assert bias is not None
    assert bias[0, :, 0].tolist() == [[0.0, 1.5], [0.0, 6.0]]


def test_some_heads_are_described_as_they_were_among_all() -> None:
    scoring = Scoring(
        torch.tensor([0.1, 0.2, 0.3, 0.4]),
        window=(1, 2, None, 4),
        sink_tokens=1,
        softcap=2.0,
        alibi=Alibi((1.0, 2.0, 3.0, 4.0), before_scale=True, bfloat16=True),
        sinks=torch.tensor([-1.0, 0.0, 1.0, 2.0]),
    )
    heads = [3, 1]
    some = scoring.of_heads(heads)
    positions = torch.arange(9)[None]
    assert torch.equal(
        some.visible(positions, positions), scoring.visible(positions, positions)[:, heads]
    )
    ours, theirs = some.bias(positions), scoring.bias(positions)
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours, theirs[:, heads])
    like = torch.ones(1)
    assert torch.equal(
        torch.as_tensor(some.head_scale(like, 2)),
        torch.as_tensor(scoring.head_scale(like, 2))[heads],
    )
    assert some.sinks is not None
    assert some.sinks.tolist() == [2.0, 0.0]
    assert (some.softcap, some.sink_tokens, some.causal) == (2.0, 1, True)


def test_what_all_heads_share_stays_when_some_are_taken() -> None:
    some = Scoring(0.5, causal=False, window=3).of_heads([1])
    assert (some.scale, some.causal, some.window, some.alibi, some.sinks) == (
        0.5,
        False,
        3,
        None,
        None,
    )
