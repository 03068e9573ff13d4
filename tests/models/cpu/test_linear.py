"""Packed linear layers equal torch's, and a row does not depend on the rows beside it."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.cpu import linear
from models.linear import Linear
from tests.models import tiny
from tests.models.cpu.conftest import needs_library

pytestmark = needs_library

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def layer(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool, seed: int = 0) -> Linear:
    torch.manual_seed(seed)
    return Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


@settings(max_examples=80)
@given(
    rows=st.integers(1, 110),
    inputs=st.integers(1, 90).map(lambda n: 2 * n),
    outputs=st.integers(1, 12).map(lambda n: 16 * n),
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
    x = torch.randn(rows, inputs).to(dtype)
    exact = torch.nn.functional.linear(
        x.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double()
    )
    theirs = (plain(x).double() - exact).abs().max()
    weight = plain.weight.clone()
    packed = linear.pack(weight)
    ours = linear.packed_linear(x, packed, plain.bias)
    allowed = max(float(theirs), 1e-6 if dtype == torch.float32 else 2**-8 * exact.abs().max())
    assert (ours.double() - exact).abs().max() <= 2 * allowed
    assert torch.equal(linear.unpack(packed, inputs), weight)


@settings(max_examples=40)
@given(
    rows=st.integers(2, 110), dtype=DTYPES, threads=st.sampled_from([1, 2]), row=st.integers(0, 109)
)
def test_a_row_is_the_same_alone_and_among_others(
    rows: int, dtype: torch.dtype, threads: int, row: int
) -> None:
    packed = linear.pack(layer(130, 80, dtype, bias=False).weight)
    x = torch.randn(rows, 130).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = linear.packed_linear(x, packed)
    finally:
        torch.set_num_threads(before)
    row = row % rows
    assert torch.equal(linear.packed_linear(x[row], packed), together[row])


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


@pytest.mark.parametrize(
    ("inputs", "outputs", "dtype"),
    [(64, 40, torch.float32), (33, 32, torch.float32), (32, 32, torch.float64)],
)
def test_what_cannot_be_packed_stays_as_it_is(
    inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    plain = layer(inputs, outputs, dtype, bias=False)
    plain.pack()
    assert plain.weight.shape == (outputs, inputs)
    assert plain.dense_weight is plain.weight


def test_a_processor_with_amx_keeps_plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = layer(64, 64, torch.bfloat16, bias=False).weight
    assert linear.can_pack(weight) or torch.cpu.get_capabilities().get("amx_bf16")
    features = {**torch.cpu.get_capabilities(), "amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert not linear.can_pack(weight)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_packed_weights_says_the_same(tied: bool) -> None:
    model = tiny.model(tiny.llama(tie_word_embeddings=tied, vocab_size=64))
    ids = torch.randint(0, 64, (2, 7))
    expected = model.logits(ids)
    size = model.num_parameters
    model.pack_weights()
    assert model.num_parameters == size
    torch.testing.assert_close(model.logits(ids), expected, rtol=0, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed = linear.pack(torch.randn(32, 64))
    with pytest.raises(RuntimeError, match="do not fit"):
        linear.packed_linear(torch.randn(2, 60), packed)
    with pytest.raises(RuntimeError, match="one type"):
        linear.packed_linear(torch.randn(2, 64).bfloat16(), packed)
    with pytest.raises(RuntimeError, match="bias"):
        linear.packed_linear(torch.randn(2, 64), packed, torch.randn(31))
    with pytest.raises(RuntimeError, match="multiples of 16"):
        linear.pack(torch.randn(20, 64))
