"""Attention head by head is the same function as the fused module, and shows each head's part."""

import pytest
import torch
from torch import Tensor

from models.attention import Attention
from models.config import HeadConfig
from models.rope import rope_table
from models.split_attention import split_attention
from tests.models import numpy_oracle, tiny

NUM_TOKENS = 13
HEADS = {
    "mha": HeadConfig(6, 6, 4),
    "gqa": HeadConfig(6, 2, 4),
    "mqa": HeadConfig(6, 1, 4),
    "scaled": HeadConfig(6, 3, 4, scale=0.9),
}


def make_attention(heads: HeadConfig, *, bias: bool, dtype: torch.dtype) -> Attention:
    config = tiny.llama(layers=(heads,), qkv_bias=bias, output_bias=bias)
    attention = Attention(config, heads, "dense").requires_grad_(False).to(dtype)
    for parameter in attention.parameters():
        parameter.normal_(0.0, 0.3)
    return attention


def rotation(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(4, NUM_TOKENS, 10_000.0)[:, :, None].to(dtype)
    return cos, sin


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_split_equals_fused(
    kind: str, bias: bool, rotated: bool, dtype: torch.dtype, bar: float
) -> None:
    attention = make_attention(HEADS[kind], bias=bias, dtype=dtype)
    hidden = torch.randn(NUM_TOKENS, 24, dtype=dtype)
    turn = rotation(dtype) if rotated else None
    fused = attention.forward_dense(hidden, turn, batch=1)
    assert (split_attention(attention, hidden, turn).output - fused).abs().max() <= bar
    assert fused.std() > 0.1, "outputs that vanish prove nothing"


@pytest.mark.parametrize("kind", HEADS)
def test_heads_and_output_bias_sum_to_the_output(kind: str) -> None:
    attention = make_attention(HEADS[kind], bias=True, dtype=torch.float64)
    split = split_attention(
        attention, torch.randn(NUM_TOKENS, 24).double(), rotation(torch.float64)
    )
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
def test_weights_are_distributions_over_the_past(kind: str) -> None:
    attention = make_attention(HEADS[kind], bias=True, dtype=torch.float64)
    hidden = torch.randn(NUM_TOKENS, 24, dtype=torch.float64)
    weights = split_attention(attention, hidden, rotation(torch.float64)).weights
    assert weights.shape == (6, NUM_TOKENS, NUM_TOKENS)
    assert (weights.sum(dim=-1) - 1).abs().max() <= 1e-12
    assert torch.equal(weights, weights.tril()), "exactly 0 above the diagonal"
    assert (weights.diagonal(dim1=1, dim2=2) > 0).all()


def test_weights_are_the_ones_that_make_the_output() -> None:
    attention = make_attention(HEADS["gqa"], bias=True, dtype=torch.float64)
    hidden = torch.randn(NUM_TOKENS, 24, dtype=torch.float64)
    query, key, _ = attention.project(hidden, rotation(torch.float64))
    # Values that are unit vectors make the oracle's output the weights themselves.
    value = torch.eye(NUM_TOKENS, dtype=torch.float64)[:, None].expand(-1, 2, -1)
    padding = (0, NUM_TOKENS - 4)
    expected = numpy_oracle.attention(
        torch.nn.functional.pad(query, padding), torch.nn.functional.pad(key, padding), value, 0.5
    )
    weights = split_attention(attention, hidden, rotation(torch.float64)).weights
    assert (weights.transpose(0, 1) - torch.from_numpy(expected)).abs().max() <= 1e-12


@pytest.mark.parametrize("changed", [1, 5, NUM_TOKENS - 1])
def test_a_token_changes_nothing_before_it(changed: int) -> None:
    attention = make_attention(HEADS["gqa"], bias=True, dtype=torch.float32)
    turn = rotation(torch.float32)
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
