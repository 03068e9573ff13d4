"""Rotary positions against complex rotation in float64 and against transformers' Llama."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.rope import apply_rope, rope_table

NUM_POSITIONS = 96


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """`apply_rope` with its own table, in the dtype of `x`."""
    table = rope_table(x.shape[-1], NUM_POSITIONS, theta).to(x.dtype)
    cos, sin = table[:, positions, None]
    return apply_rope(x, cos, sin)


@pytest.mark.parametrize("head_dim", [2, 6, 64])
@pytest.mark.parametrize("theta", [10_000.0, 500.0, 5e5])
def test_pairs_turn_by_position_times_frequency(head_dim: int, theta: float) -> None:
    x = torch.randn(NUM_POSITIONS, 3, head_dim, dtype=torch.float64)
    numbers = x.numpy()
    half = head_dim // 2
    expected = np.empty_like(numbers)
    for position in range(NUM_POSITIONS):
        for i in range(half):
            angle = position * theta ** (-2 * i / head_dim)
            turned = (numbers[position, :, i] + 1j * numbers[position, :, i + half]) * np.exp(
                1j * angle
            )
            expected[position, :, i], expected[position, :, i + half] = turned.real, turned.imag
    rotated = rotate(x, torch.arange(NUM_POSITIONS), theta).numpy()
    # The table is float32: its angles, up to NUM_POSITIONS, carry that rounding.
    np.testing.assert_allclose(rotated, expected, rtol=0, atol=1e-4)
    assert np.abs(rotated - expected).mean() < 1e-5


def test_the_rotation_itself_is_exact() -> None:
    x = torch.randn(5, 2, 6, dtype=torch.float64)
    angles = torch.randn(5, 1, 3, dtype=torch.float64)
    pairs = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((pairs.real, pairs.imag), dim=-1)
    assert (apply_rope(x, angles.cos(), angles.sin()) - expected).abs().max() <= 1e-14


@pytest.mark.parametrize("theta", [10_000.0, 5e5])
def test_equal_to_transformers(theta: float) -> None:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=NUM_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    query, key = torch.randn(NUM_POSITIONS, 4, 16), torch.randn(NUM_POSITIONS, 2, 16)
    positions = torch.randperm(NUM_POSITIONS)
    cos, sin = LlamaRotaryEmbedding(config)(query, positions[None])
    table = rope_table(16, NUM_POSITIONS, theta)[:, positions]
    torch.testing.assert_close(table[0], cos[0, :, :8], rtol=0, atol=1e-7)
    torch.testing.assert_close(table[1], sin[0, :, :8], rtol=0, atol=1e-7)
    their_query, their_key = apply_rotary_pos_emb(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin
    )
    for ours, theirs in (
        (rotate(query, positions, theta), their_query[0].transpose(0, 1)),
        (rotate(key, positions, theta), their_key[0].transpose(0, 1)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_rotation_keeps_every_length_and_position_zero_keeps_all() -> None:
    x = torch.randn(NUM_POSITIONS, 3, 16, dtype=torch.float64)
    rotated = rotate(x, torch.arange(NUM_POSITIONS), 10_000.0)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(rotated[0], x[0])
    assert not torch.allclose(rotated[1], x[1])


@given(
    query_position=st.integers(0, 40),
    key_position=st.integers(0, 40),
    shift=st.integers(0, NUM_POSITIONS - 41),
)
def test_scores_depend_on_the_distance_only(
    query_position: int, key_position: int, shift: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=generator)

    def score(at: int, of: int) -> float:
        rotated_query = rotate(query, torch.tensor([at]), 10_000.0)
        rotated_key = rotate(key, torch.tensor([of]), 10_000.0)
        return float((rotated_query * rotated_key).sum())

    here = score(query_position, key_position)
    moved = score(query_position + shift, key_position + shift)
    assert abs(here - moved) <= 1e-4
    if query_position != key_position:
        assert abs(here - score(key_position, key_position)) > 1e-3, "distance must matter"
