"""One function, three implementations, and the identities that the field relies on."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import masks
from models.kernels import dense, reference
from models.kernels.reference import Attended
from models.scoring import Scoring
from models.split_attention import attend_by_head

EXPLICIT: tuple[Callable[..., Attended], ...] = (reference.attend, attend_by_head)
KV_HEADS = (6, 3, 2, 1)


def qkv(
    num_kv_heads: int = 6,
    *,
    queries: int = 5,
    keys: int = 9,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Six query heads; values narrower than keys."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 6, queries, 8), (2, num_kv_heads, keys, 8), (2, num_kv_heads, keys, 4))
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return query, key, value


@st.composite
def scorings(draw: st.DrawFn) -> Scoring:
    numbers = st.lists(st.floats(-2, 2), min_size=6, max_size=6).map(torch.tensor)
    return Scoring(
        scale=draw(st.floats(0.1, 2.0) | numbers),
        softcap=draw(st.none() | st.floats(0.5, 5.0)),
        sinks=draw(st.none() | numbers),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=100)
@given(
    scoring=scorings(),
    num_kv_heads=st.sampled_from(KV_HEADS),
    masked=st.sampled_from(["no", "each head", "one for all"]),
    biased=st.booleans(),
    queries=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_fused_explicit_and_split_are_one_function(
    dtype: torch.dtype,
    scoring: Scoring,
    num_kv_heads: int,
    masked: str,
    biased: bool,
    queries: int,
    seed: int,
) -> None:
    inputs = qkv(num_kv_heads, queries=queries, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    heads = 6 if masked == "each head" else 1
    visible = torch.rand((2, heads, queries, 9), generator=generator) < 0.3  # some see nothing
    bias = torch.randn((2, 6, queries, 9), generator=generator, dtype=torch.float64).to(dtype)
    seen = None if masked == "no" else visible
    added = bias if biased else None
    bar = 1e-12 if dtype == torch.float64 else 2e-6
    explicit = reference.attend(*inputs, scoring, visible=seen, bias=added)
    fused = dense.attend(*inputs, scoring, visible=seen, bias=added)
    assert (fused - explicit.output).abs().max() <= bar
    split = attend_by_head(*inputs, scoring, visible=seen, bias=added)
    for ours, other in zip(split, explicit, strict=True):
        # The same -inf, or near.
        assert torch.equal(ours.isfinite(), other.isfinite())
        assert (ours - other).nan_to_num().abs().max() <= bar
    assert not torch.cat([part.flatten() for part in explicit]).isnan().any()


@pytest.mark.parametrize("attend", EXPLICIT)
@pytest.mark.parametrize("num_kv_heads", KV_HEADS)
def test_shared_key_value_heads_are_repeated_ones(
    attend: Callable[..., Attended], num_kv_heads: int
) -> None:
    query, key, value = qkv(num_kv_heads)
    shared = attend(query, key, value, Scoring(0.6))
    for head in range(6):
        kv_head = head * num_kv_heads // 6
        alone = attend(query[:, [head]], key[:, [kv_head]], value[:, [kv_head]], Scoring(0.6))
        for ours, part in zip(alone, shared, strict=True):
            assert (ours[:, 0] - part[:, head]).abs().max() <= 1e-14


@pytest.mark.parametrize("attend", EXPLICIT)
def test_a_sink_scales_the_output_by_a_sigmoid_of_the_log_sum_exp(
    attend: Callable[..., Attended],
) -> None:
    inputs, visible = qkv(2), masks.causal(5, 9)
    sinks = torch.tensor([-4.0, -1.0, 0.0, 0.5, 2.0, 6.0], dtype=torch.float64)
    plain = attend(*inputs, Scoring(0.6), visible=visible)
    sunk = attend(*inputs, Scoring(0.6, sinks=sinks), visible=visible)
    share = (plain.lse - sinks[:, None]).sigmoid()[..., None]
    assert torch.equal(sunk.lse, plain.lse), "the sink's logit is not part of it"
    assert (sunk.output - plain.output * share).abs().max() <= 1e-12
    assert (sunk.weights - plain.weights * share).abs().max() <= 1e-12
    fused = dense.attend(*inputs, Scoring(0.6, sinks=sinks), visible=visible)
    assert (fused - sunk.output).abs().max() <= 1e-12
    assert share.min() < 0.05, "a sink that takes nothing proves nothing"


@pytest.mark.parametrize("attend", EXPLICIT)
def test_a_sink_of_0_is_a_key_and_a_value_of_zeros(attend: Callable[..., Attended]) -> None:
    query, key, value = qkv(2)
    sunk = attend(query, key, value, Scoring(0.6, sinks=torch.zeros(6)))
    longer = (torch.nn.functional.pad(part, (0, 0, 0, 1)) for part in (key, value))
    appended = attend(query, *longer, Scoring(0.6))
    assert (sunk.output - appended.output).abs().max() <= 1e-12
    assert (sunk.weights - appended.weights[..., :-1]).abs().max() <= 1e-12
    assert ((-sunk.lse).sigmoid() - appended.weights[..., -1]).abs().max() <= 1e-12


def merge(parts: list[Attended]) -> tuple[Tensor, Tensor]:
    """Online softmax: read chunk after chunk, remember the output so far and its log-sum-exp."""
    output, lse = parts[0].output, parts[0].lse
    for part in parts[1:]:
        total = torch.logaddexp(lse, part.lse)
        seen = total > float("-inf")
        old, new = ((x - total).exp().where(seen, 0.0)[..., None] for x in (lse, part.lse))
        output, lse = output * old + part.output * new, total
    return output, lse


@pytest.mark.parametrize("attend", EXPLICIT)
@settings(max_examples=50)
@given(cuts=st.lists(st.integers(1, 8), unique=True, max_size=8).map(sorted), high=st.booleans())
def test_chunks_of_keys_merged_by_log_sum_exp_are_the_whole(
    attend: Callable[..., Attended], cuts: list[int], high: bool
) -> None:
    query, key, value = qkv(2)
    scoring = Scoring(200.0 if high else 0.6)  # exp overflows without a running maximum
    visible = masks.causal(5, 9)  # in the last chunks, the first queries see nothing
    whole = attend(query, key, value, scoring, visible=visible)
    bounds = [0, *cuts, 9]
    parts = [
        attend(query, key[:, :, a:b], value[:, :, a:b], scoring, visible=visible[..., a:b])
        for a, b in pairwise(bounds)
    ]
    output, lse = merge(parts)
    assert (output - whole.output).abs().max() <= 1e-12
    assert (lse - whole.lse).abs().max() <= 1e-12 * whole.lse.abs().max()


@pytest.mark.parametrize("attend", EXPLICIT)
@settings(max_examples=50)
@given(scoring=scorings().map(lambda s: replace(s, sinks=None)), seed=st.integers(0, 2**16))
def test_weights_sum_to_1_are_0_where_masked_and_blind_queries_read_0(
    attend: Callable[..., Attended], scoring: Scoring, seed: int
) -> None:
    visible = torch.rand((2, 6, 5, 9), generator=torch.Generator().manual_seed(seed)) < 0.3
    visible[0, 0, 0] = False
    inputs = qkv(2, seed=seed)
    attended = attend(*inputs, scoring, visible=visible)
    sees = visible.any(dim=-1)
    assert (attended.weights.sum(dim=-1) - sees.double()).abs().max() <= 1e-12
    assert (attended.weights[~visible] == 0).all()
    for output in (attended.output, dense.attend(*inputs, scoring, visible=visible)):
        assert (output[~sees] == 0).all()
        assert (output[sees] != 0).all()
    assert (attended.lse[~sees] == float("-inf")).all()
