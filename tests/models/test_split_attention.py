"""Attention head by head is the same function as the fused module, and shows each head's part."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.attention import Attention
from models.config import HeadConfig, QKNorm
from models.kernels import reference
from models.positions import Alibi, RopeConfig, alibi_slopes
from models.rope import rotation
from models.scoring import Scoring
from models.split_attention import attend_by_head, split_attention
from tests.models import numpy_oracle, tiny

NUM_TOKENS = 13
ROPE = RopeConfig(10_000.0, 4)
GQA = HeadConfig(6, 2, 4, rope=ROPE)
HEADS = {
    "mha": HeadConfig(6, 6, 4, rope=ROPE),
    "gqa": GQA,
    "mqa": HeadConfig(6, 1, 4, rope=ROPE),
    "scaled": HeadConfig(6, 3, 4, rope=ROPE, scale=0.9),
    "window": replace(GQA, window=3, sink_tokens=1),
    "window-each-head": replace(GQA, window=(1, 2, None, 4, 5, 99), sink_tokens=2),
    "softcap": replace(GQA, softcap=1.5),
    "learned-sinks": replace(GQA, learned_sinks=True),
    "alibi": replace(GQA, alibi=Alibi(alibi_slopes(6))),
    "alibi-before-scale": replace(GQA, alibi=Alibi(alibi_slopes(6), True, True)),
    "temperature": replace(GQA, temperature=(0.5, 1.0, 1.5, 2.0, 2.5, 3.0)),
    "qk-norm-of-a-head": replace(GQA, qk_norm=QKNorm("rms_norm", "head", 1e-5, True)),
    "qk-norm-of-each-head": replace(GQA, qk_norm=QKNorm("layer_norm", "each_head", 1e-5)),
    "qk-norm-of-all-heads": replace(GQA, qk_norm=QKNorm("rms_norm", "all_heads", 1e-5)),
    "clip": replace(GQA, clip_qkv=0.4),
    "bidirectional": replace(GQA, causal=False, window=4),
    "interleaved": replace(GQA, rope=RopeConfig(100.0, 2, interleaved=True)),
    "all-at-once": replace(
        GQA,
        window=(1, 2, None, 4, 5, 99),
        sink_tokens=1,
        softcap=1.5,
        learned_sinks=True,
        temperature=(0.5, 1.0, 1.5, 2.0, 2.5, 3.0),
    ),
}
SINKING = ("learned-sinks", "all-at-once")


def make_attention(heads: HeadConfig, *, bias: bool, dtype: torch.dtype) -> Attention:
    config = tiny.llama(layers=(heads,), qkv_bias=bias, output_bias=bias)
    attention = Attention(config, heads, "dense").requires_grad_(False).to(dtype)
    for parameter in attention.parameters():
        parameter.normal_(0.0, 0.3)
    return attention


def turns(dtype: torch.dtype, rope: RopeConfig | None = ROPE) -> tuple[Tensor, Tensor]:
    positions = torch.arange(NUM_TOKENS)
    cos, sin = rotation(rope or ROPE, positions, positions)
    return cos.to(dtype), sin.to(dtype)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_split_equals_fused(
    kind: str, bias: bool, rotated: bool, dtype: torch.dtype, bar: float
) -> None:
    attention = make_attention(HEADS[kind], bias=bias, dtype=dtype)
    hidden = torch.randn(NUM_TOKENS, 24, dtype=dtype)
    turn = turns(dtype, HEADS[kind].rope) if rotated else None
    fused = attention.forward_dense(hidden, turn, batch=1)
    assert (split_attention(attention, hidden, turn).output - fused).abs().max() <= bar
    assert fused.std() > 0.1, "outputs that vanish prove nothing"


@pytest.mark.parametrize("kind", HEADS)
def test_heads_and_output_bias_sum_to_the_output(kind: str) -> None:
    attention = make_attention(HEADS[kind], bias=True, dtype=torch.float64)
    split = split_attention(attention, torch.randn(NUM_TOKENS, 24).double(), turns(torch.float64))
    assert split.head_outputs.shape == (6, NUM_TOKENS, 24)
    summed = split.head_outputs.sum(dim=0) + attention.output.bias
    assert (summed - split.output).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_output_is_what_remains_when_other_heads_write_nothing(kind: str) -> None:
    attention = make_attention(HEADS[kind], bias=False, dtype=torch.float64)
    hidden = torch.randn(NUM_TOKENS, 24, dtype=torch.float64)
    split = split_attention(attention, hidden, None)
    weight = attention.output.weight.clone()
    for head in range(6):
        columns = slice(4 * head, 4 * head + 4)
        attention.output.weight.zero_()
        attention.output.weight[:, columns] = weight[:, columns]
        alone = attention.forward_dense(hidden, None, batch=1)
        assert (alone - split.head_outputs[head]).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", HEADS)
def test_weights_are_distributions_over_what_is_seen(kind: str) -> None:
    heads = HEADS[kind]
    attention = make_attention(heads, bias=True, dtype=torch.float64)
    hidden = torch.randn(NUM_TOKENS, 24, dtype=torch.float64)
    split = split_attention(attention, hidden, turns(torch.float64, heads.rope))
    weights = split.weights
    assert weights.shape == (6, NUM_TOKENS, NUM_TOKENS)
    expected = torch.ones(6, NUM_TOKENS, dtype=torch.float64)
    if attention.sinks is not None:
        assert kind in SINKING
        expected = torch.sigmoid(split.lse - attention.sinks[:, None])
    assert (weights.sum(dim=-1) - expected).abs().max() <= 1e-12
    for head, query, key in itertools.product(range(6), range(NUM_TOKENS), range(NUM_TOKENS)):
        seen = numpy_oracle.in_window(query, key, heads.windows[head], heads.sink_tokens)
        seen = seen and (key <= query or not heads.causal)
        assert (weights[head, query, key] > 0) == seen, "exactly 0 where nothing is seen"


@pytest.mark.parametrize("kind", HEADS)
def test_output_weights_and_log_sum_exp_are_those_of_the_oracle(kind: str) -> None:
    heads = HEADS[kind]
    attention = make_attention(heads, bias=True, dtype=torch.float64)
    hidden = torch.randn(NUM_TOKENS, 24, dtype=torch.float64)
    turn = turns(torch.float64, heads.rope)
    split = split_attention(attention, hidden, turn)
    query, key, value = (numpy_oracle.array(part) for part in attention.project(hidden, turn))
    temperature = heads.temperature or (1.0,) * 6
    scales = [heads.softmax_scale * factor for factor in temperature]
    bias = attention.scoring.bias(torch.arange(NUM_TOKENS)[None])  # see test_scoring
    expected = numpy_oracle.attention(
        query,
        key,
        value,
        lambda head, row, at: (
            (at <= row or not heads.causal)
            and numpy_oracle.in_window(row, at, heads.windows[head], heads.sink_tokens)
        ),
        scales=scales,
        softcap=heads.softcap,
        bias=lambda head, at: 0.0 if bias is None else float(bias[0, head, 0, at]),
        sinks=None if attention.sinks is None else attention.sinks.tolist(),
    )
    assert (split.weights - torch.from_numpy(expected.weights)).abs().max() <= 1e-12
    assert (split.lse - torch.from_numpy(expected.lse)).abs().max() <= 1e-12
    read = torch.from_numpy(expected.output).flatten(1)
    output = read @ attention.output.weight.T + attention.output.bias
    assert (split.output - output).abs().max() <= 1e-12


def test_heads_take_their_own_part_of_masks_and_biases() -> None:
    query, key, value = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64)
    key, value = key[:, :2], value[:, :2]
    mask = torch.rand(2, 4, 7, 7) < 0.7
    bias = torch.randn(1, 4, 1, 7, dtype=torch.float64)
    scoring = Scoring(torch.rand(4, dtype=torch.float64), sinks=torch.randn(4).double())
    for visible in (mask, mask[:, :1], mask[:1], None):
        for added in (bias, bias[:, :1], None):
            whole = reference.attend(query, key, value, scoring, visible=visible, bias=added)
            split = attend_by_head(query, key, value, scoring, visible=visible, bias=added)
            for ours, theirs in zip(split, whole, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changed", [1, 5, NUM_TOKENS - 1])
def test_a_token_changes_nothing_before_it(changed: int) -> None:
    attention = make_attention(HEADS["gqa"], bias=True, dtype=torch.float32)
    turn = turns(torch.float32)
    hidden = torch.randn(NUM_TOKENS, 24)
    other = hidden.clone()
    other[changed] += 1.0
    before, after = (split_attention(attention, x, turn) for x in (hidden, other))
    assert torch.equal(before.output[:changed], after.output[:changed])
    assert torch.equal(before.head_outputs[:, :changed], after.head_outputs[:, :changed])
    assert torch.equal(before.weights[:, :changed], after.weights[:, :changed])
    fused_before, fused_after = (attention.forward_dense(x, turn, batch=1) for x in (hidden, other))
    assert torch.equal(fused_before[:changed], fused_after[:changed])
    for later in range(changed, NUM_TOKENS):
        assert not torch.equal(before.output[later], after.output[later])
