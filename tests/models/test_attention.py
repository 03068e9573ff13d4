"""Grouped-query and multi-query attention are multi-head attention with repeated heads."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from models.attention import Attention
from models.attention_metadata import AttentionMetadata
from models.config import HeadConfig, ModelConfig, QKNorm
from models.kernels import KernelName
from models.kv_cache import KVCache
from models.positions import RopeConfig
from models.rope import rotation
from models.transformer import random_model
from tests.models import numpy_oracle, tiny
from tests.models.kernels import KERNELS
from tests.models.numpy_oracle import Array, array

NUM_TOKENS = 11
ROPE = RopeConfig(10_000.0, 8)


def config_of(num_kv_heads: int) -> ModelConfig:
    heads = HeadConfig(num_heads=6, num_kv_heads=num_kv_heads, head_dim=8, rope=ROPE)
    return tiny.llama(layers=(heads,), qkv_bias=True, output_bias=True)


def make_attention(config: ModelConfig, kernel: KernelName = "dense") -> Attention:
    attention = Attention(config, config.layers[0], kernel).requires_grad_(False)
    for parameter in attention.parameters():
        parameter.normal_(0.0, 0.3)
    return attention


def with_repeated_heads(source: Attention, kernel: KernelName) -> Attention:
    """The multi-head module that holds a copy of each key/value head for every query head."""
    heads = source.heads
    target = make_attention(config_of(heads.num_heads), kernel)

    def repeat(rows: Tensor) -> Tensor:
        per_head = rows.reshape(heads.num_kv_heads, heads.head_dim, -1)
        repeated = per_head.repeat_interleave(heads.num_queries_per_kv, dim=0)
        return repeated.reshape(-1, *rows.shape[1:])

    widths = [source.query_width, source.kv_width, source.kv_width]
    for ours, theirs in (
        (source.qkv.weight, target.qkv.weight),
        (source.qkv.bias, target.qkv.bias),
    ):
        query, key, value = torch.split(ours, widths)
        theirs.copy_(torch.cat((query, repeat(key), repeat(value))))
    target.output.load_state_dict(source.output.state_dict())
    return target


def turns() -> tuple[Tensor, Tensor]:
    positions = torch.arange(NUM_TOKENS)
    return rotation(ROPE, positions, positions)


def paged(attention: Attention, hidden: Tensor, num_kv_heads: int) -> Tensor:
    """A chunk of all tokens but two, then one decode after the other."""
    cos, sin = turns()
    cache = KVCache(
        config_of(num_kv_heads),
        num_pages=4,
        block_size=3,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    outputs: list[Tensor] = []
    for start, end in itertools.pairwise((0, NUM_TOKENS - 2, NUM_TOKENS - 1, NUM_TOKENS)):
        metadata = AttentionMetadata.build(
            block_tables=[[[2, 0, 3, 1]]],
            num_computed_tokens=[start],
            num_new_tokens=[end - start],
            block_size=3,
            device=torch.device("cpu"),
        )
        part = (cos[start:end], sin[start:end])
        outputs.append(attention(hidden[start:end], part, cache.layers[0], metadata))
    return torch.cat(outputs)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
def test_shared_heads_equal_repeated_heads(num_kv_heads: int, kernel: KernelName) -> None:
    shared = make_attention(config_of(num_kv_heads), kernel)
    repeated = with_repeated_heads(shared, kernel)
    hidden = torch.randn(NUM_TOKENS, 24)
    dense = shared.forward_dense(hidden, turns(), batch=1)
    assert (dense - repeated.forward_dense(hidden, turns(), batch=1)).abs().max() <= 1e-6
    through_cache = paged(shared, hidden, num_kv_heads)
    assert (through_cache - paged(repeated, hidden, num_kv_heads=6)).abs().max() <= 1e-6
    assert (through_cache - dense).abs().max() <= 1e-6 * dense.abs().max()
    assert dense.std() > 0.1, "outputs that vanish prove nothing"


def test_query_heads_of_a_group_are_neighbours() -> None:
    """Query head h reads key/value head h // group: only its own group sees a changed value."""
    attention = make_attention(config_of(num_kv_heads=2))
    attention.output.weight.copy_(torch.eye(24, 48))
    hidden = torch.randn(NUM_TOKENS, 24)
    before = attention.forward_dense(hidden, None, batch=1)
    second_value_head = slice(attention.query_width + attention.kv_width + 8, None)
    attention.qkv.weight[second_value_head] += 1.0
    after = attention.forward_dense(hidden, None, batch=1)
    # The identity keeps the first 24 of 48 columns: query heads 0, 1 and 2.
    assert torch.equal(before, after)
    attention.output.weight.copy_(torch.eye(24, 48).roll(24, dims=1))
    attention.qkv.weight[second_value_head] -= 1.0
    before = attention.forward_dense(hidden, None, batch=1)
    attention.qkv.weight[second_value_head] += 1.0
    after = attention.forward_dense(hidden, None, batch=1)
    assert ((after - before).abs().amax(dim=0) > 1e-3).all()


def test_batched_rows_are_independent() -> None:
    attention = make_attention(config_of(num_kv_heads=2))
    cos, sin = turns()
    hidden = torch.randn(3, NUM_TOKENS, 24)
    tiled = (cos.repeat(3, 1, 1), sin.repeat(3, 1, 1))
    together = attention.forward_dense(hidden.flatten(0, 1), tiled, batch=3)
    for row, alone in zip(together.chunk(3), hidden, strict=True):
        expected = attention.forward_dense(alone, (cos, sin), batch=1)
        assert (row - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["rope", "learned"])
def test_layers_may_differ_in_their_heads(family: str, kernel: KernelName) -> None:
    shapes = ((6, 6, 4), (6, 2, 8), (2, 1, 16), (5, 1, 4))
    layers = tuple(
        HeadConfig(*shape, rope=RopeConfig(10_000.0, shape[2]) if family == "rope" else None)
        for shape in shapes
    )
    config = (tiny.llama if family == "rope" else tiny.gpt2)(layers=layers)
    model = tiny.model(config, kernel=kernel)
    tokens = torch.randint(0, config.vocab_size, (23,))
    (chunked,) = tiny.paged_logits(model, [tokens], [[9], [5], [1], [8]])
    assert (chunked - model.logits(tokens[None])[0]).abs().max() <= 1e-5


def test_the_scale_of_a_layer_is_used() -> None:
    plain, scaled = (
        random_model(tiny.llama(layers=(HeadConfig(4, 2, 8, scale=scale),)), seed=0)
        for scale in (None, 0.9)
    )
    tokens = torch.randint(0, 61, (1, 9))
    assert (plain.logits(tokens) - scaled.logits(tokens)).abs().max() > 1e-3
    (chunked,) = tiny.paged_logits(scaled, [tokens[0]], [[6], [1], [1], [1]])
    assert (chunked - scaled.logits(tokens)[0]).abs().max() <= 1e-5


# What happens between the projection and the cache


def normalised(row: Array, config: QKNorm | None, weight: Array) -> list[Array]:
    """The heads of one token's queries or keys."""
    if config is not None and config.scope == "all_heads":
        row = numpy_oracle.rms_norm(row, weight, config.eps)
    heads = [row[start : start + 8] for start in range(0, len(row), 8)]
    if config is not None and config.scope == "head":
        gain = weight + config.unit_offset
        return [numpy_oracle.rms_norm(head, gain, config.eps) for head in heads]
    if config is not None and config.scope == "each_head":
        return [
            numpy_oracle.layer_norm(head, own, config.eps)
            for head, own in zip(heads, weight, strict=True)
        ]
    return heads


@pytest.mark.parametrize(
    "qk_norm",
    [
        QKNorm("rms_norm", "head", 1e-3),
        QKNorm("rms_norm", "head", 1e-3, unit_offset=True),
        QKNorm("layer_norm", "each_head", 1e-3),
        QKNorm("rms_norm", "all_heads", 1e-3),
        None,
    ],
    ids=["head", "offset", "each", "all", "none"],
)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_queries_and_keys_are_clipped_then_normalised_then_rotated(
    qk_norm: QKNorm | None, clip: float | None
) -> None:
    heads = HeadConfig(6, 2, 8, rope=ROPE, qk_norm=qk_norm, clip_qkv=clip)
    attention = make_attention(tiny.llama(layers=(heads,), qkv_bias=True)).double()
    hidden = torch.randn(NUM_TOKENS, 24, dtype=torch.float64)
    angles = torch.randn(NUM_TOKENS, 1, 4, dtype=torch.float64)
    query, key, value = attention.project(hidden, (angles.cos(), angles.sin()))
    rows = array(hidden) @ array(attention.qkv.weight).T + array(attention.qkv.bias)
    if clip is not None:
        rows = np.minimum(np.maximum(rows, -clip), clip)
    assert np.abs(array(value).reshape(NUM_TOKENS, -1) - rows[:, 64:]).max() <= 1e-12
    for ours, norm, columns in (
        (query, attention.query_norm, rows[:, :48]),
        (key, attention.key_norm, rows[:, 48:64]),
    ):
        weight = np.ones(8) if norm is None else array(norm.weight)
        for token in range(NUM_TOKENS):
            for head, normed in enumerate(normalised(columns[token], qk_norm, weight)):
                turned = numpy_oracle.rotate(normed, angles[token, 0].tolist(), interleaved=False)
                assert np.abs(array(ours[token, head]) - turned).max() <= 1e-12


def test_temperature_is_a_factor_on_the_queries_of_a_head() -> None:
    temperature = (0.5, 1.0, 2.0, 3.0, 0.1, 1.5)
    plain = make_attention(config_of(num_kv_heads=2)).double()
    warm = Attention(
        config_of(num_kv_heads=2),
        HeadConfig(6, 2, 8, rope=ROPE, temperature=temperature),
        "dense",
    ).requires_grad_(False)
    warm.double().load_state_dict(plain.state_dict())
    factors = torch.tensor(temperature, dtype=torch.float64).repeat_interleave(8)
    plain.qkv.weight[:48] *= factors[:, None]
    plain.qkv.bias[:48] *= factors
    hidden = torch.randn(NUM_TOKENS, 24, dtype=torch.float64)
    cos, sin = (part.double() for part in turns())
    expected = plain.forward_dense(hidden, (cos, sin), batch=1)
    assert (warm.forward_dense(hidden, (cos, sin), batch=1) - expected).abs().max() <= 1e-6
