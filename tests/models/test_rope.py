"""Rotary positions in all forms, against loops over complex numbers and against transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPTJConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj import modeling_gptj
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.positions import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from models.rope import apply_rope, frequencies, rotation
from tests.models import numpy_oracle

NUM_POSITIONS = 96
THETA = 10_000.0
DIM = 16
SHORT = tuple(1.0 + 0.1 * i for i in range(DIM // 2))
LONG = tuple(2.0 + i for i in range(DIM // 2))
ORIGINAL = 16


@dataclass(frozen=True)
class Form:
    """One form of scaling: ours, the oracle's by length, and transformers' settings."""

    scaling: RopeScaling | None
    oracle: Callable[[int], list[float]]
    settings: dict[str, Any]
    attention_factor: float = 1.0


def yarn_form(*, truncate: bool, beta_fast: float = 32.0, original: int = ORIGINAL) -> Form:
    return Form(
        YarnScaling(4.0, original, 1.25, beta_fast, 1.0, truncate),
        lambda length: numpy_oracle.yarn_frequencies(
            THETA, DIM, 4.0, original, beta_fast, 1.0, truncate
        ),
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "attention_factor": 1.25,
            "beta_fast": beta_fast,
            "truncate": truncate,
            "original_max_position_embeddings": original,
        },
        1.25,
    )


FORMS: dict[str, Form] = {
    "plain": Form(
        None,
        lambda length: numpy_oracle.plain_frequencies(THETA, DIM),
        {"rope_type": "default"},
    ),
    "linear": Form(
        LinearScaling(3.0),
        lambda length: [f / 3 for f in numpy_oracle.plain_frequencies(THETA, DIM)],
        {"rope_type": "linear", "factor": 3.0},
    ),
    "dynamic": Form(
        DynamicNtkScaling(4.0, ORIGINAL),
        lambda length: numpy_oracle.dynamic_frequencies(THETA, DIM, 4.0, ORIGINAL, length),
        {"rope_type": "dynamic", "factor": 4.0},
    ),
    "yarn": yarn_form(truncate=True, original=4096),
    "yarn-exact": yarn_form(truncate=False, original=4096),
    "yarn-short": yarn_form(truncate=True),
    "yarn-point": yarn_form(truncate=False, beta_fast=1.0, original=64),
    "llama3": Form(
        Llama3Scaling(8.0, 1.0, 4.0, 64),
        lambda length: numpy_oracle.llama3_frequencies(THETA, DIM, 8.0, 1.0, 4.0, 64),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "longrope": Form(
        LongRopeScaling(SHORT, LONG, ORIGINAL, 1.5),
        lambda length: numpy_oracle.longrope_frequencies(THETA, DIM, SHORT, LONG, ORIGINAL, length),
        {
            "rope_type": "longrope",
            "short_factor": list(SHORT),
            "long_factor": list(LONG),
            "factor": 4.0,
            "attention_factor": 1.5,
            "original_max_position_embeddings": ORIGINAL,
        },
        1.5,
    ),
}
LENGTHS = (1, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 40, 96)


def their_config(form: Form, **changes: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_theta": THETA, **form.settings, **changes},
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", FORMS)
def test_frequencies_follow_the_formula(name: str, length: int) -> None:
    """Within what float32 can hold; some exponents and logarithms cost a digit."""
    form = FORMS[name]
    ours = frequencies(RopeConfig(THETA, DIM, scaling=form.scaling), torch.tensor([length]))
    assert ours.dtype == torch.float32
    expected = np.array(form.oracle(length))
    np.testing.assert_allclose(ours.reshape(-1).numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", [name for name in FORMS if name != "plain"])
def test_frequencies_are_those_of_transformers(name: str, length: int) -> None:
    form = FORMS[name]
    theirs, factor = ROPE_INIT_FUNCTIONS[form.settings["rope_type"]](
        their_config(form), seq_len=length
    )
    ours = frequencies(RopeConfig(THETA, DIM, scaling=form.scaling), torch.tensor([length]))
    # The base of the dynamic form is a Python number there, and a tensor here.
    bar = 2e-7 if name == "dynamic" else 0.0
    torch.testing.assert_close(ours.reshape(-1), theirs, rtol=bar, atol=0)
    assert factor == form.attention_factor


@pytest.mark.parametrize("name", FORMS)
def test_no_two_forms_turn_alike(name: str) -> None:
    """Else a mistaken branch would go unseen."""
    tables = {other: np.array(form.oracle(40)) for other, form in FORMS.items() if other != name}
    own = np.array(FORMS[name].oracle(40))
    assert all(np.abs(own - table).max() > 1e-4 for table in tables.values())


def test_a_token_sees_the_length_of_its_own_sequence() -> None:
    lengths = torch.tensor([40, 8, 17, 16])
    for name in ("dynamic", "longrope"):
        config = RopeConfig(THETA, DIM, scaling=FORMS[name].scaling)
        together = frequencies(config, lengths)
        assert together.shape == (4, DIM // 2)
        for row, length in zip(together, lengths, strict=True):
            assert torch.equal(row, frequencies(config, length[None])[0])


@pytest.mark.parametrize("rotary_dim", [2, 6, 10, 64])
@pytest.mark.parametrize("theta", [500.0, 10_000.0, 5e5])
def test_only_rotated_dimensions_count(rotary_dim: int, theta: float) -> None:
    ours = frequencies(RopeConfig(theta, rotary_dim), torch.tensor([1])).numpy()
    expected = numpy_oracle.plain_frequencies(theta, rotary_dim)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


# Rotation


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 4, 8, 12])
def test_pairs_turn_and_the_rest_stays(rotary_dim: int, interleaved: bool) -> None:
    x = torch.randn(5, 3, 12, dtype=torch.float64)
    angles = torch.randn(5, 1, rotary_dim // 2, dtype=torch.float64)
    turned = apply_rope(x, angles.cos(), angles.sin(), interleaved=interleaved)
    for token in range(5):
        for head in range(3):
            expected = numpy_oracle.rotate(
                x[token, head].numpy(), angles[token, 0].tolist(), interleaved=interleaved
            )
            assert np.abs(turned[token, head].numpy() - expected).max() <= 1e-12
    assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("name", FORMS)
def test_tokens_turn_by_position_times_frequency(name: str) -> None:
    form = FORMS[name]
    positions, length = torch.arange(NUM_POSITIONS), NUM_POSITIONS
    cos, sin = rotation(
        RopeConfig(THETA, DIM, scaling=form.scaling), positions, torch.full_like(positions, length)
    )
    assert cos.shape == sin.shape == (NUM_POSITIONS, 1, DIM // 2)
    assert cos.dtype == torch.float32
    angles = np.arange(NUM_POSITIONS)[:, None] * np.array(form.oracle(length))
    # Angles are float32 up to the last position.
    for ours, exact in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        difference = np.abs(ours[:, 0].numpy() - form.attention_factor * exact)
        assert difference.max() <= 3e-5


@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize("name", FORMS)
def test_whole_sequences_are_rotated_as_transformers_does(name: str, length: int) -> None:
    form = FORMS[name]
    positions = torch.arange(length)
    query, key = torch.randn(length, 4, DIM), torch.randn(length, 2, DIM)
    their_cos, their_sin = LlamaRotaryEmbedding(their_config(form))(query, positions[None])
    cos, sin = rotation(
        RopeConfig(THETA, DIM, scaling=form.scaling), positions, torch.full_like(positions, length)
    )
    half = DIM // 2
    assert (cos[:, 0] - their_cos[0, :, :half]).abs().max() <= 4e-6
    assert (sin[:, 0] - their_sin[0, :, :half]).abs().max() <= 4e-6
    their_query, their_key = apply_rotary_pos_emb(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], their_cos, their_sin
    )
    for ours, theirs in ((query, their_query), (key, their_key)):
        turned = apply_rope(ours, cos, sin)
        assert (turned - theirs[0].transpose(0, 1)).abs().max() <= 2e-5


def test_interleaved_pairs_are_those_of_gpt_j() -> None:
    config = GPTJConfig(n_embd=64, n_head=4, n_positions=NUM_POSITIONS, rotary_dim=8)
    positions = torch.randperm(NUM_POSITIONS)
    table = modeling_gptj.create_sinusoidal_positions(NUM_POSITIONS, config.rotary_dim)
    their_sin, their_cos = table[positions].chunk(2, dim=-1)
    x = torch.randn(NUM_POSITIONS, 4, 16)
    theirs = modeling_gptj.apply_rotary_pos_emb(x[None, ..., :8], their_sin[None], their_cos[None])
    cos, sin = rotation(RopeConfig(THETA, 8, interleaved=True), positions, positions)
    ours = apply_rope(x, cos, sin, interleaved=True)
    assert (ours[..., :8] - theirs[0]).abs().max() <= 2e-5
    assert torch.equal(ours[..., 8:], x[..., 8:])
    assert (apply_rope(x, cos, sin) - ours).abs().max() > 0.1, "the other pairs differ"


# Known relations


def turned(x: Tensor, position: int, *, interleaved: bool = False) -> Tensor:
    at = torch.tensor([position])
    cos, sin = rotation(RopeConfig(THETA, x.shape[-1]), at, at)
    return apply_rope(x, cos.to(x), sin.to(x), interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_keeps_every_length_and_position_zero_keeps_all(interleaved: bool) -> None:
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    assert torch.equal(turned(x, 0, interleaved=interleaved), x)
    for position in (1, 7, 95):
        moved = turned(x, position, interleaved=interleaved)
        torch.testing.assert_close(moved.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
        assert not torch.allclose(moved, x)


@given(
    query_position=st.integers(0, 40),
    key_position=st.integers(0, 40),
    shift=st.integers(0, NUM_POSITIONS - 41),
    interleaved=st.booleans(),
)
def test_scores_depend_on_the_distance_only(
    query_position: int, key_position: int, shift: int, interleaved: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=generator)

    def score(at: int, of: int) -> float:
        first = turned(query, at, interleaved=interleaved)
        return float((first * turned(key, of, interleaved=interleaved)).sum())

    here = score(query_position, key_position)
    moved = score(query_position + shift, key_position + shift)
    assert abs(here - moved) <= 1e-4
    if query_position != key_position:
        assert abs(here - score(key_position, key_position)) > 1e-3, "distance must matter"
