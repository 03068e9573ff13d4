"""Linear layers and attention by tiles of a matrix unit: the same as by vectors, whatever the unit.

Where the processor has none, an emulator says what it would compute: what this then tests is the
way in which the unit is used. The unit itself is tried when the library is loaded.
"""

import signal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.config import KVCacheDType
from models.cpu import library
from models.cpu.linear import WeightDType, pack, why_unpackable
from tests.models.batches import Case, make_batch
from tests.models.cpu.units import TILES, multiplying_by
from tests.models.kernels import needs_library
from tests.models.variants import Variant

pytestmark = needs_library


@pytest.mark.parametrize("unit", TILES)
@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 140),
    inputs=st.integers(1, 170).map(lambda n: 4 * n),
    outputs=st.integers(1, 150),
    weight_dtype=st.sampled_from(["auto", "int8"]),
    seed=st.integers(0, 2**16),
)
@example(rows=65, inputs=1060, outputs=150, weight_dtype="auto", seed=0)
@example(rows=17, inputs=2052, outputs=33, weight_dtype="int8", seed=0)
@example(rows=1, inputs=4, outputs=1, weight_dtype="int8", seed=0)
@example(rows=65, inputs=2100, outputs=80, weight_dtype="auto", seed=0)  # in two parts
@example(rows=3, inputs=4200, outputs=80, weight_dtype="int8", seed=0)
def test_tiles_multiply_as_vectors_do(
    unit: str, rows: int, inputs: int, outputs: int, weight_dtype: WeightDType, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = (torch.randn(size, inputs).bfloat16() for size in (outputs, rows))
    packed = pack(weight, weight_dtype)
    with multiplying_by("vectors"):
        expected = packed.multiply(x)
    with multiplying_by(unit):
        found = packed.multiply(x)
        alone = packed.multiply(x[rows // 2])
    assert torch.equal(alone, found[rows // 2]), "a row does not depend on the rows beside it"
    if weight_dtype == "int8":
        assert torch.equal(found, expected), "sums of whole numbers are exact"
        return
    exact = x.double() @ weight.double().T
    error, allowed = ((one.double() - exact).abs().max() for one in (found, expected))
    assert error <= 2 * allowed + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("unit", TILES)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 5, 17]),
    head_dim=st.sampled_from([8, 32, 40, 64, 96]),
    sequences=st.lists(st.tuples(st.integers(0, 150), st.just(1)), min_size=1, max_size=3),
    prompt=st.integers(2, 90),
    seed=st.integers(0, 2**16),
)
def test_tiles_attend_as_vectors_do(
    unit: str,
    kv_cache_dtype: KVCacheDType,
    kv_heads: int,
    group: int,
    head_dim: int,
    sequences: list[tuple[int, int]],
    prompt: int,
    seed: int,
) -> None:
    """To what bfloat16 leaves of them, against the definition in twice the precision."""
    case = Case(kv_heads, group, head_dim, 16, (*sequences, (20, prompt)), seed)
    batch = make_batch(case, torch.bfloat16, kv_cache_dtype=kv_cache_dtype)
    variant = Variant(num_heads=kv_heads * group)
    exact = batch.run("reference", variant).double()
    with multiplying_by("vectors"):
        by_vectors = batch.run("paged_cpu", variant)
    with multiplying_by(unit):
        by_tiles = batch.run("paged_cpu", variant)
    error, allowed = ((one.double() - exact).abs().max() for one in (by_tiles, by_vectors))
    assert error <= 2 * allowed + 2**-8 * exact.abs().max()


@pytest.mark.parametrize("unit", TILES)
def test_floats_are_multiplied_by_vectors_all_the_same(unit: str) -> None:
    weight, x = torch.randn(70, 90), torch.randn(40, 90)
    packed = pack(weight)
    expected = packed.multiply(x)
    with multiplying_by(unit):
        assert torch.equal(packed.multiply(x), expected)


@pytest.mark.parametrize("unit", TILES)
def test_what_is_no_number_spoils_its_own_row_only(unit: str) -> None:
    weight, x = torch.randn(50, 600).bfloat16(), torch.randn(37, 600).bfloat16()
    packed = pack(weight)
    with multiplying_by(unit):
        clean = packed.multiply(x)
        x[20, 33] = torch.nan
        spoilt = packed.multiply(x)
    assert spoilt[20].isnan().all()
    spoilt[20] = clean[20]
    assert torch.equal(spoilt, clean)


def test_a_unit_that_nobody_knows_is_refused() -> None:
    with pytest.raises(RuntimeError, match="allowed: vectors, amx, emulated_amx"):
        torch.ops.headroom.multiply_by("magic")


def test_a_unit_is_used_where_it_works() -> None:
    assert torch.ops.headroom.amx_works() == library.multiplies_by_amx()


@pytest.mark.parametrize("children", [signal.SIG_DFL, signal.SIG_IGN], ids=["kept", "reaped"])
def test_a_child_that_dies_of_an_instruction_says_no(children: signal.Handlers) -> None:
    """Whoever waits for children of this process; and nothing is printed or ends here."""
    before = signal.signal(signal.SIGCHLD, children)
    try:
        for answer in (True, False):
            assert torch.ops.headroom.answer_of_child(answer, 0) == answer
        for dies_of in (signal.SIGILL, signal.SIGSEGV, signal.SIGKILL):
            assert not torch.ops.headroom.answer_of_child(True, dies_of)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_weights_stay_plain_where_torch_has_amx_and_we_cannot_use_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.randn(64, 64).bfloat16()
    for has_amx, works, expected in (
        (False, False, None),
        (True, False, "the processor has AMX, which torch's operations use"),
        (True, True, None),
    ):
        features = {**torch.cpu.get_capabilities(), "amx_bf16": has_amx}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        monkeypatch.setattr("models.cpu.linear.multiplies_by_amx", lambda works=works: works)
        assert why_unpackable(weight) == expected
        assert why_unpackable(weight, although_slower=True) is None
        assert why_unpackable(weight.float()) is None  # AMX has no float32
        assert why_unpackable(weight, "int8") is None
