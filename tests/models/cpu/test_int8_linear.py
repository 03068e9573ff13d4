"""Weights of 8 bits: exact in what they round, bounded in what they lose, and nothing is hidden."""

import dataclasses
import inspect
import json.decoder

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.bits_per_byte import bits_per_byte
from models.checkpoints.bundled import BUNDLED_MODELS
from models.checkpoints.loader import load_model
from models.config import HeadConfig
from models.cpu.linear import PackedWeight, pack, round_to_int8
from models.errors import ConfigError
from models.linear import Linear
from models.tokenizer import Tokenizer
from tests.models import tiny
from tests.models.kernels import needs_library

pytestmark = needs_library

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def whole_numbers(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row to 8 bits, symmetric, as the definition says; in float64."""
    scale = x.double().abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(scale > 0, (x.double() / scale), 0).round(), scale


@settings(max_examples=80)
@given(
    rows=st.integers(1, 110),
    inputs=st.integers(1, 90).map(lambda n: 4 * n),
    outputs=st.integers(1, 200),
    bias=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 2**16),
)
@example(rows=49, inputs=1028, outputs=80, bias=True, dtype=torch.bfloat16, seed=0)
def test_it_is_within_what_rounding_to_8_bits_can_lose(
    rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(rows, inputs).to(dtype)
    added = torch.randn(outputs).to(dtype) if bias else None
    found = pack(weight, "int8").multiply(x, added).double()
    (wholes, scale), (row_wholes, row_scale) = whole_numbers(weight), whole_numbers(x)
    offset = 0 if added is None else added.double()
    # A tie may be rounded either way where a quotient is not exact: one number in the last place.
    ideal = row_wholes @ wholes.T * row_scale * scale.T + offset
    in_place = row_scale * scale.T * 127
    rounding = (2**-8 if dtype == torch.bfloat16 else 1e-5) * ideal.abs()
    assert ((found - ideal).abs() <= 2 * in_place + rounding + 1e-6).all()
    exact = x.double() @ weight.double().T + offset
    lost = (
        x.double().abs().sum(1, keepdim=True) @ scale.T.double() / 2
        + row_scale @ weight.double().abs().sum(1, keepdim=True).T / 2
        + inputs * row_scale * scale.T / 4
    )
    assert ((found - exact).abs() <= 1.01 * lost + rounding + 1e-6).all()


@settings(max_examples=40)
@given(rows=st.integers(2, 110), dtype=DTYPES, row=st.integers(0, 109))
def test_a_row_is_the_same_alone_and_among_others(rows: int, dtype: torch.dtype, row: int) -> None:
    packed = pack(torch.randn(80, 132).to(dtype), "int8")
    x = torch.randn(rows, 132).to(dtype) * torch.logspace(-3, 3, rows).to(dtype)[:, None]
    row = row % rows
    assert torch.equal(packed.multiply(x[row]), packed.multiply(x)[row])


def test_a_typical_layer_loses_about_one_percent() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(256, 768), torch.randn(64, 768)
    exact = x.double() @ weight.double().T
    error = pack(weight, "int8").multiply(x).double() - exact
    assert 0.002 < error.norm() / exact.norm() < 0.015


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(bad: float) -> None:
    """A step finds broken sequences by their hidden states."""
    packed = pack(torch.randn(48, 64), "int8")
    x = torch.randn(3, 64)
    x[1, 5] = bad
    found = packed.multiply(x)
    assert not found[1].isfinite().any()
    assert found[[0, 2]].isfinite().all()


def test_zeros_give_zeros() -> None:
    assert torch.equal(
        pack(torch.zeros(20, 8), "int8").multiply(torch.randn(2, 8)), torch.zeros(2, 20)
    )
    assert torch.equal(
        pack(torch.randn(20, 8), "int8").multiply(torch.zeros(2, 8)), torch.zeros(2, 20)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_gives_what_is_left(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Linear(64, 80).to(dtype).requires_grad_(False)
    weight = plain.weight.clone()
    plain.pack("int8")
    assert plain.weight.dtype == torch.int8
    assert plain.dtype == dtype
    wholes, scale = whole_numbers(weight)
    torch.testing.assert_close(plain.dense_weight, (wholes * scale).to(dtype))
    saved = plain.state_dict()
    assert saved["weight"].dtype == dtype
    plain.to(torch.float64)
    torch.testing.assert_close(plain.weight, saved["weight"].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_again_changes_nothing(dtype: torch.dtype) -> None:
    """Whatever the largest weight of an output is; all numbers from 1 to 2 were asked once."""
    mantissas = torch.arange(0, 2**23, 61, dtype=torch.int32)
    largest = (mantissas + 0x3F800000).view(torch.float32)
    weight = torch.stack((largest, largest * torch.linspace(-1, 1, len(largest))), dim=1).to(dtype)
    wholes, scale = round_to_int8(weight)
    again = round_to_int8((wholes * scale[:, None]).to(dtype))
    assert torch.equal(again[0], wholes)
    assert torch.equal(again[1], scale)


def test_a_model_reads_a_quarter_of_the_bytes_and_says_nearly_the_same() -> None:
    config = tiny.llama(
        hidden_size=32, intermediate_size=48, vocab_size=64, layers=(HeadConfig(4, 2, 8),)
    )
    model = tiny.model(config)
    ids = torch.randint(0, 64, (2, 7))
    expected, read = model.logits(ids), model.step_bytes
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    model.pack_weights("int8")
    assert (model.step_bytes - norms) * 4 == read - norms
    found = model.logits(ids)
    assert 0 < (found - expected).norm() / expected.norm() < 0.05
    model.unpack_weights()
    torch.testing.assert_close(
        model.logits(ids), found, rtol=0, atol=0.05 * float(found.abs().max())
    )


def test_what_cannot_be_rounded_is_refused_before_anything_is() -> None:
    model = tiny.model(tiny.llama(hidden_size=32, intermediate_size=30, vocab_size=64))
    with pytest.raises(
        ConfigError, match="allowed: auto, because a weight has 30 inputs"
    ) as caught:
        model.pack_weights("int8")
    assert caught.value.field == "weight_dtype"
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_weights_are_rounded_after_they_were_packed_but_not_back() -> None:
    config = tiny.llama(hidden_size=32, intermediate_size=48, layers=(HeadConfig(4, 2, 8),))
    model, other = tiny.model(config), tiny.model(config)
    ids = torch.randint(0, config.vocab_size, (2, 7))
    model.pack_weights()
    for packed in (model, other):
        packed.pack_weights("int8")
    assert torch.equal(model.logits(ids), other.logits(ids))
    with pytest.raises(ConfigError, match="allowed: int8: the weights are rounded already"):
        model.pack_weights()


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed = pack(torch.randn(64, 64), "int8")
    assert packed.int8 is not None

    def changed(**values: Tensor) -> PackedWeight:
        assert packed.int8 is not None
        return dataclasses.replace(packed, int8=dataclasses.replace(packed.int8, **values))

    for width in (60, 32, 128):
        with pytest.raises(RuntimeError, match="do not fit"):
            packed.multiply(torch.randn(2, width))
    for wrong in ({"scale": torch.randn(64).double()}, {"row_sums": torch.zeros(64)}):
        with pytest.raises(RuntimeError, match="a scale and a sum"):
            changed(**wrong).multiply(torch.randn(2, 64))
    with pytest.raises(RuntimeError, match="bias"):
        packed.multiply(torch.randn(2, 64), torch.randn(31))


def test_the_demo_model_loses_less_than_a_hundredth_of_a_bit_per_byte() -> None:
    text = inspect.getsource(json.decoder)
    demo = BUNDLED_MODELS["demo"]
    tokenizer = Tokenizer.from_directory(demo)
    model = load_model(demo)
    plain = bits_per_byte(model, tokenizer, [text])
    model.pack_weights("int8")
    rounded = bits_per_byte(model, tokenizer, [text])
    assert plain != rounded
    assert abs(rounded - plain) <= 0.01
