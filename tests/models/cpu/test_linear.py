"""Packed linear layers equal torch's, and a row does not depend on the rows beside it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.before import Before
from models.checkpoints.loader import load_model
from models.checkpoints.writer import save_model
from models.cpu import linear
from models.cpu.linear import WeightDType
from models.layers import Gate, LayerNorm, RMSNorm
from models.linear import BeforeLinear, Linear
from tests.models import tiny
from tests.models.cpu.units import UNITS, multiplying_by
from tests.models.kernels import needs_library

pytestmark = needs_library

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def layer(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool, seed: int = 0) -> Linear:
    torch.manual_seed(seed)
    return Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


@settings(max_examples=80)
@given(
    rows=st.integers(1, 110),
    inputs=st.integers(1, 90).map(lambda n: 2 * n),
    outputs=st.integers(1, 200),
    bias=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 2**16),
)
@example(rows=48, inputs=128, outputs=64, bias=True, dtype=torch.bfloat16, seed=0)
@example(rows=49, inputs=130, outputs=80, bias=False, dtype=torch.bfloat16, seed=0)
def test_a_packed_layer_equals_a_plain_one(
    rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    plain = layer(inputs, outputs, dtype, bias=bias, seed=seed)
    x = torch.randn(rows, inputs).to(dtype)  # after the seed of the layer
    exact = torch.nn.functional.linear(
        x.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double()
    )
    theirs = (plain(x).double() - exact).abs().max()
    weight = plain.weight.clone()
    packed = linear.pack(weight)
    ours = packed.multiply(x, plain.bias)
    allowed = max(float(theirs), 1e-6 if dtype == torch.float32 else 2**-8 * exact.abs().max())
    assert (ours.double() - exact).abs().max() <= 2 * allowed
    assert torch.equal(packed.unpack(), weight)


@settings(max_examples=40)
@given(
    rows=st.integers(2, 110),
    dtype=DTYPES,
    threads=st.sampled_from([1, 2, 5]),
    row=st.integers(0, 109),
)
def test_a_row_is_the_same_alone_and_among_others(
    rows: int, dtype: torch.dtype, threads: int, row: int
) -> None:
    packed = linear.pack(layer(130, 80, dtype, bias=False).weight)
    x = torch.randn(rows, 130).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = packed.multiply(x)
    finally:
        torch.set_num_threads(before)
    row = row % rows
    assert torch.equal(packed.multiply(x[row]), together[row])


@pytest.mark.parametrize("unit", UNITS)
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 110),
    inputs=st.integers(1, 45).map(lambda n: 4 * n),
    outputs=st.integers(1, 200),
    before=st.sampled_from(["nothing", "norm", "gate"]),
    bias=st.booleans(),
    residual=st.booleans(),
    weight_dtype=st.sampled_from(["auto", "int8"]),
    dtype=DTYPES,
)
@example(
    rows=100,
    inputs=768,
    outputs=64,
    before="norm",
    bias=True,
    residual=True,
    weight_dtype="int8",
    dtype=torch.bfloat16,
)
@example(
    rows=100,
    inputs=768,
    outputs=64,
    before="gate",
    bias=True,
    residual=True,
    weight_dtype="auto",
    dtype=torch.bfloat16,
)
@torch.inference_mode()
def test_what_comes_before_and_after_has_the_same_bits_in_one_operation(
    unit: str,
    rows: int,
    inputs: int,
    outputs: int,
    before: str,
    bias: bool,
    residual: bool,
    weight_dtype: WeightDType,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(rows)
    norm = RMSNorm(inputs, 1e-5).to(dtype).requires_grad_(False)
    norm.weight.normal_()
    step: BeforeLinear | None = {"nothing": None, "norm": norm, "gate": Gate("silu")}[before]
    x = torch.randn(rows, inputs * (2 if before == "gate" else 1)).to(dtype)
    added = torch.randn(rows, outputs).to(dtype)
    fused = layer(inputs, outputs, dtype, bias=bias)
    fused._packed = linear.pack(fused.weight, weight_dtype)
    with multiplying_by(unit):
        expected = fused(x if step is None else step(x))
        if residual:
            expected = added + expected
        assert torch.equal(fused(x, step, added if residual else None), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_packing_it_is_two_operations(dtype: torch.dtype) -> None:
    plain = layer(64, 32, dtype, bias=True)
    norm = LayerNorm(64).to(dtype).requires_grad_(False)
    x, residual = torch.randn(5, 64, dtype=dtype), torch.randn(5, 32, dtype=dtype)
    expected = residual + torch.nn.functional.linear(norm(x), plain.weight, plain.bias)
    assert torch.equal(plain(x, norm, residual), expected)
    plain.pack()
    torch.testing.assert_close(plain(x, norm, residual), expected)


@pytest.fixture
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is AMX that our operations cannot use, bfloat16 is not packed."""
    features = {**torch.cpu.get_capabilities(), "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)


@pytest.mark.usefixtures("without_amx")
def test_packing_keeps_the_layer_and_its_size() -> None:
    plain = layer(66, 80, torch.bfloat16, bias=True)
    weight, numel = plain.weight.clone(), plain.weight.numel()
    x = torch.randn(3, 2, 66).bfloat16()
    expected = plain(x)
    plain.pack()
    assert plain.weight.shape == (numel,)
    assert torch.equal(plain.dense_weight, weight)
    torch.testing.assert_close(plain(x), expected)
    plain.pack()  # once is enough
    assert plain.weight.shape == (numel,)
    plain.unpack()
    assert torch.equal(plain.weight, weight)


@pytest.mark.usefixtures("without_amx")
def test_a_packed_layer_is_saved_loaded_and_moved_as_a_plain_one() -> None:
    plain = layer(66, 80, torch.bfloat16, bias=True)
    weight = plain.weight.clone()
    plain.pack()
    saved = plain.state_dict()
    assert torch.equal(saved["weight"], weight)
    assert plain.weight.dim() == 1
    plain.load_state_dict({"weight": weight + 1, "bias": saved["bias"]})
    assert torch.equal(plain.dense_weight, weight + 1)
    plain.pack()
    plain.to(torch.float32)  # in which a packed weight has another order
    assert torch.equal(plain.dense_weight, (weight + 1).float())


@pytest.mark.usefixtures("without_amx")
def test_gradients_reach_the_input_of_a_packed_layer() -> None:
    plain = layer(66, 80, torch.float32, bias=True)
    x = torch.randn(3, 66, requires_grad=True)
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    plain.pack()
    (found,) = torch.autograd.grad(plain(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("inputs", "outputs", "dtype"),
    [(33, 32, torch.float32), (32, 32, torch.float64)],
)
def test_what_cannot_be_packed_stays_as_it_is(
    inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    plain = layer(inputs, outputs, dtype, bias=False)
    plain.pack()
    assert plain.weight.shape == (outputs, inputs)
    assert plain.dense_weight is plain.weight


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_packed_weights_says_the_same(tied: bool) -> None:
    model = tiny.model(tiny.llama(tie_word_embeddings=tied, vocab_size=61))
    ids = torch.randint(0, 61, (2, 7))
    expected = model.logits(ids)
    size = model.num_parameters
    model.pack_weights()
    assert model.num_parameters == size
    torch.testing.assert_close(model.logits(ids), expected, rtol=0, atol=1e-5)


def test_a_model_that_ran_is_saved_moved_and_trained_as_before(tmp_path: Path) -> None:
    model = tiny.model(tiny.llama(tie_word_embeddings=True, vocab_size=64))
    ids = torch.randint(0, 64, (2, 7))
    expected = model.logits(ids)
    model.pack_weights()
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).logits(ids), expected)
    with torch.no_grad():
        model.double().float()
        torch.testing.assert_close(model.logits(ids), expected, rtol=0, atol=1e-6)
        model.pack_weights()
        model.unpack_weights()
        model.embed_tokens.weight[3] += 1.0  # the head too
    assert (model.logits(ids) - expected)[..., 3].abs().max() > 0.1


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed = linear.pack(torch.randn(64, 64))
    for width in (60, 32, 128):
        with pytest.raises(RuntimeError, match="do not fit"):
            packed.multiply(torch.randn(2, width))
    with pytest.raises(RuntimeError, match="do not fit"):
        dataclasses.replace(packed, outputs=32).multiply(torch.randn(2, 64))
    with pytest.raises(RuntimeError, match="one type"):
        packed.multiply(torch.randn(2, 64).bfloat16())
    for bias in (torch.randn(31), torch.randn(64).bfloat16(), torch.randn(128)[::2]):
        with pytest.raises(RuntimeError, match="bias"):
            packed.multiply(torch.randn(2, 64), bias)
    x, right = torch.randn(2, 64), torch.randn(64)
    for norm in (right[:63], right.bfloat16(), torch.randn(128)[::2]):
        with pytest.raises(RuntimeError, match="before it comes a norm"):
            packed.multiply(x, before=Before(norm=norm))
    with pytest.raises(RuntimeError, match="before it comes a norm"):
        packed.multiply(torch.randn(2, 128), before=Before(norm=right, swiglu=True))
    for residual in (torch.randn(2, 63), torch.randn(3, 64), torch.randn(2, 64).bfloat16()):
        with pytest.raises(RuntimeError, match="the residual is what the output is"):
            packed.multiply(x, residual=residual)
    with pytest.raises(RuntimeError, match="a multiple of 2"):
        linear.pack(torch.randn(20, 63).bfloat16())
