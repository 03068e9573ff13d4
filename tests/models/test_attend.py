"""Attention without a cache: both implementations against loops over float64 numbers, against
torch and transformers, and against what is known about it."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from models.kernels import dense, reference
from models.kernels.reference import Attended
from models.scoring import Scoring
from tests.models import numpy_oracle
from tests.models.variants import EACH_HEAD, PLAIN, Inputs, Variant, random_inputs, variants


def both(variant: Variant, inputs: Inputs) -> tuple[Tensor, Attended]:
    """What the dense and the reference implementation say; the last query is at the last key."""
    scoring, length = variant.scoring(), inputs.key.shape[2]
    positions = torch.arange(length)[None]
    visible = scoring.visible(positions[:, length - inputs.query.shape[2] :], positions)
    bias = scoring.bias(positions)
    return (
        dense.attend(*inputs, scoring, visible=visible, bias=bias),
        reference.attend(*inputs, scoring, visible=visible, bias=bias),
    )


def check_both(variant: Variant, inputs: Inputs) -> None:
    """Both implementations, and all that the reference tells, against the oracle."""
    bar = 1e-12
    fused, plain = both(variant, inputs)
    assert fused.shape == inputs.query.shape
    for row in range(len(fused)):
        expected = variant.expected(*inputs.row(row))
        output = torch.from_numpy(expected.output).transpose(0, 1)
        assert (fused[row] - output).abs().max() <= bar
        assert (plain.output[row] - output).abs().max() <= bar
        assert (plain.weights[row] - torch.from_numpy(expected.weights)).abs().max() <= bar
        assert (plain.lse[row] - torch.from_numpy(expected.lse)).abs().max() <= bar


@settings(max_examples=100)
@given(data=st.data())
def test_attention_without_a_cache_equals_loops(data: st.DataObject) -> None:
    num_kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    num_queries, num_cached = data.draw(st.integers(1, 7)), data.draw(st.integers(0, 7))
    inputs = random_inputs(
        batch=2,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        length=num_cached + num_queries,
        dim=data.draw(st.sampled_from([1, 3, 8])),
        seed=data.draw(st.integers(0, 2**16)),
    )
    variant = data.draw(variants(num_kv_heads * group))
    variant = replace(variant, causal=data.draw(st.sampled_from([True, True, False])))
    check_both(variant, inputs.last(num_queries))


LARGE: dict[str, Variant] = {
    "plain": Variant(8),
    "bidirectional": Variant(8, causal=False),
    "window": Variant(8, window=33),
    "bidirectional-window": Variant(8, window=7, causal=False),
    "window-each-head": Variant(8, window=(1, 5, None, 64, 128, 129, 200, 3), sink_tokens=4),
    "softcap": Variant(8, scales=0.9, softcap=2.0),
    "sinks": Variant(8, sinks=(-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 5.0, 9.0)),
    "bloom": Variant(8, alibi="bloom"),
    "mpt": Variant(8, alibi="mpt"),
    "falcon": Variant(8, alibi="falcon", scales=0.25),
    "temperature": Variant(8, scales=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
}


@pytest.mark.parametrize(("length", "dim"), [(129, 16), (33, 80), (17, 64), (1, 8)])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("name", LARGE)
def test_long_sequences_and_wide_heads_equal_loops(
    name: str, num_kv_heads: int, length: int, dim: int
) -> None:
    inputs = random_inputs(
        batch=1, num_heads=8, num_kv_heads=num_kv_heads, length=length, dim=dim, seed=length
    )
    check_both(LARGE[name], inputs)


# Falcon's biases lose whole positions above 256, which is seen only in long sequences.
def test_falcons_biases_are_rounded_at_long_positions_too() -> None:
    variant = LARGE["falcon"]
    inputs = random_inputs(batch=1, num_heads=8, num_kv_heads=1, length=301, dim=8)
    check_both(variant, inputs.last(3))
    late = torch.tensor([[256, 257]])
    rounded, whole = (
        replace(variant, scales=1.0, alibi=alibi).scoring().bias(late)
        for alibi in ("falcon", "bloom")
    )
    assert rounded is not None
    assert whole is not None
    assert (rounded[..., 0] == rounded[..., 1]).all(), "bfloat16 does not know 257"
    assert (whole[..., 0] != whole[..., 1]).all()


def document_mask(length: int) -> Tensor:
    """Several sequences in one, each causal in itself."""
    documents = torch.arange(length) // 5
    return (documents[:, None] == documents) & torch.ones(length, length).tril().bool()


def prefix_mask(length: int) -> Tensor:
    """The first tokens are seen by all, the others causally."""
    mask = torch.ones(length, length).tril().bool()
    mask[:, :4] = True
    return mask


def blind_mask(length: int) -> Tensor:
    """Queries that see nothing at all."""
    mask = torch.ones(length, length).tril().bool()
    mask[[0, 3]] = False
    return mask


@pytest.mark.parametrize("make_mask", [document_mask, prefix_mask, blind_mask])
@pytest.mark.parametrize("variant", [PLAIN, replace(EACH_HEAD, window=None)], ids=["plain", "all"])
def test_any_mask_can_be_given(make_mask: Callable[[int], Tensor], variant: Variant) -> None:
    inputs = random_inputs(batch=2, num_heads=6, num_kv_heads=2, length=13, dim=8)
    mask = make_mask(13)
    scoring = variant.scoring()
    fused = dense.attend(*inputs, scoring, visible=mask[None, None])
    plain = reference.attend(*inputs, scoring, visible=mask[None, None])
    for row in range(2):
        expected = numpy_oracle.attention(
            *inputs.row(row),
            lambda head, at, of: bool(mask[at, of]),
            scales=(0.37,) * 6 if isinstance(variant.scales, float) else variant.scales,
            softcap=variant.softcap,
            sinks=variant.sinks,
        )
        output = torch.from_numpy(expected.output).transpose(0, 1)
        assert (fused[row] - output).abs().max() <= 1e-12
        assert (plain.output[row] - output).abs().max() <= 1e-12
        assert (plain.weights[row] - torch.from_numpy(expected.weights)).abs().max() <= 1e-12
        assert torch.equal(plain.lse[row].isinf(), torch.from_numpy(np.isinf(expected.lse)))
    assert (plain.weights[:, :, ~mask] == 0).all(), "exactly 0 where nothing is seen"


@pytest.mark.parametrize("length", [1, 2, 13])
def test_a_flag_for_causal_is_the_causal_mask(length: int) -> None:
    inputs = random_inputs(batch=2, num_heads=6, num_kv_heads=2, length=length, dim=8)
    for variant in (PLAIN, Variant(softcap=2.0), Variant(sinks=(0.5,) * 6)):
        flagged = dense.attend(*inputs, variant.scoring(), is_causal=length > 1)
        mask = torch.ones(length, length).tril().bool()[None, None]
        masked = reference.attend(*inputs, variant.scoring(), visible=mask)
        assert (flagged - masked.output).abs().max() <= 1e-12


# Against others


def compare_in_float32(variant: Variant, theirs: Tensor, inputs: Inputs) -> None:
    """Ours are near theirs, and no worse than twice theirs against the oracle."""
    fused, plain = both(variant, inputs.to(torch.float32))
    exact = torch.from_numpy(variant.expected(*inputs.row(0)).output).transpose(0, 1)
    bar = 2 * float((theirs[0] - exact).abs().max())
    for ours in (fused, plain.output):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= 2e-6
        assert (ours[0] - exact).abs().max() <= bar


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize(
    "variant", [PLAIN, Variant(window=9), Variant(causal=False)], ids=["causal", "window", "both"]
)
def test_float32_is_as_exact_as_torchs_own_mathematics(variant: Variant, num_kv_heads: int) -> None:
    inputs = random_inputs(
        batch=1, num_heads=6, num_kv_heads=num_kv_heads, length=65, dim=64, seed=3
    )
    variant = replace(variant, scales=0.125)
    rows = torch.arange(65)
    distance = rows[:, None] - rows
    mask = (distance >= 0) | (not variant.causal)
    if variant.window is not None:
        mask &= distance < 9
    with sdpa_kernel(SDPBackend.MATH):
        theirs = scaled_dot_product_attention(
            *inputs.to(torch.float32), attn_mask=mask, enable_gqa=True
        )
    compare_in_float32(variant, theirs, inputs)


def additive(length: int) -> Tensor:
    return torch.full((1, 1, length, length), -math.inf).triu(1)


def test_learned_sinks_equal_gpt_oss() -> None:
    inputs = random_inputs(batch=1, num_heads=6, num_kv_heads=2, length=33, dim=16)
    variant = Variant(scales=0.25, sinks=(-3.0, -1.0, 0.0, 1.0, 2.0, 4.0))
    module = SimpleNamespace(
        sinks=torch.tensor(variant.sinks), num_key_value_groups=3, training=False
    )
    theirs, weights = modeling_gpt_oss.eager_attention_forward(
        module, *inputs.to(torch.float32), additive(33), scaling=0.25
    )
    compare_in_float32(variant, theirs.transpose(1, 2), inputs)
    _, ours = both(variant, inputs.to(torch.float32))
    assert (ours.weights - weights).abs().max() <= 1e-6


def test_the_soft_cap_equals_gemma_2() -> None:
    inputs = random_inputs(batch=1, num_heads=6, num_kv_heads=2, length=33, dim=16)
    module = SimpleNamespace(num_key_value_groups=3, training=False)
    theirs, _ = modeling_gemma2.eager_attention_forward(
        module, *inputs.to(torch.float32), additive(33), scaling=0.9, softcap=2.0
    )
    compare_in_float32(Variant(scales=0.9, softcap=2.0), theirs.transpose(1, 2), inputs)


# Known relations


@pytest.mark.parametrize("sink", [-30.0, -1.0, 0.0, 3.0, 30.0])
def test_a_sink_only_shrinks_what_is_read(sink: float) -> None:
    """By the logistic function of log-sum-exp minus sink (Miller 2023)."""
    inputs = random_inputs(batch=2, num_heads=4, num_kv_heads=2, length=17, dim=8)
    mask = torch.ones(17, 17).tril().bool()[None, None]
    plain = reference.attend(*inputs, Scoring(0.4), visible=mask)
    scoring = Scoring(0.4, sinks=torch.full((4,), sink, dtype=torch.float64))
    expected = torch.sigmoid(plain.lse - sink)[..., None] * plain.output
    with_sink = reference.attend(*inputs, scoring, visible=mask)
    assert (with_sink.output - expected).abs().max() <= 1e-12
    assert torch.equal(with_sink.lse, plain.lse), "the sink is no key"
    assert (dense.attend(*inputs, scoring, is_causal=True) - expected).abs().max() <= 1e-12


def test_a_cap_that_never_bites_and_a_window_that_never_ends_change_nothing() -> None:
    inputs = random_inputs(batch=1, num_heads=4, num_kv_heads=2, length=17, dim=8)
    positions = torch.arange(17)[None]
    plain = Scoring(0.4)
    expected = dense.attend(*inputs, plain, is_causal=True)
    for scoring in (
        Scoring(0.4, softcap=1e9),
        Scoring(0.4, window=17),
        Scoring(0.4, window=(17, None, 99, 17)),
        Scoring(0.4, window=1, sink_tokens=17),
        Scoring(torch.full((4,), 0.4, dtype=torch.float64)),
    ):
        visible = scoring.visible(positions, positions)
        output = dense.attend(*inputs, scoring, visible=visible)
        assert (output - expected).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "variant", [Variant(2), Variant(2, softcap=1e4), Variant(2, sinks=(0.0,) * 2)]
)
def test_large_scores_do_not_overflow(variant: Variant) -> None:
    inputs = Inputs(*(200 * torch.randn(3, 1, 2, 6, 8)))
    variant = replace(variant, scales=1.0)
    expected = variant.expected(*inputs.row(0)).output
    fused, plain = both(variant, inputs)
    for output in (fused, plain.output):
        difference = np.abs(output[0].transpose(0, 1).numpy() - expected)
        assert difference.max() <= 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_keep_their_digits_in_half_precision(dtype: torch.dtype) -> None:
    """A bias of a late position has more digits than the type; its neighbours' differ by one
    slope all the same."""
    inputs = random_inputs(batch=1, num_heads=4, num_kv_heads=2, length=700, dim=8).to(dtype)
    variant = Variant(4, alibi="bloom", scales=0.3)
    output, _ = both(variant, inputs.last(4))
    expected = variant.expected(*inputs.last(4).row(0)).output
    assert output.dtype == dtype
    assert np.abs(output[0].transpose(0, 1).double().numpy() - expected).max() <= 0.02
