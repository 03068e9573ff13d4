"""What lies between products equals torch's own operations, for the tensors that it can take."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from models.config import HeadConfig
from models.cpu import fused
from models.kv_cache import KVCache
from models.rope import apply_rope
from tests.models import tiny
from tests.models.kernels import needs_library

pytestmark = needs_library

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
WIDTHS = st.integers(1, 100)
ROWS = st.integers(1, 9)


def numbers(*shape: int, dtype: torch.dtype, seed: int, factor: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * factor).to(dtype)


def assert_rounded_once(ours: Tensor, exact: Tensor) -> None:
    """In bfloat16 within half a unit of the last place, and float32's own error."""
    assert ours.shape == exact.shape
    unit = 2.0**-8 if ours.dtype == torch.bfloat16 else 0.0
    allowed = exact.abs() * (unit + 2e-6) + 2e-6
    assert bool(((ours.double() - exact).abs() <= allowed).all())


@settings(max_examples=60)
@given(rows=ROWS, width=WIDTHS, dtype=DTYPES, seed=st.integers(0, 2**16))
def test_rms_norm(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x, weight = (numbers(*shape, dtype=dtype, seed=seed) for shape in ((rows, width), (width,)))
    exact = rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert_rounded_once(fused.rms_norm(x, weight, 1e-5), exact)


@settings(max_examples=60)
@given(rows=ROWS, width=WIDTHS, dtype=DTYPES, seed=st.integers(0, 2**16))
def test_silu_mul(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x = numbers(rows, 2 * width, dtype=dtype, seed=seed)
    gate, value = x.double().chunk(2, dim=-1)
    assert_rounded_once(fused.silu_mul(x), silu(gate) * value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=60)
@given(
    rows=ROWS,
    width=WIDTHS | st.sampled_from([1023, 1024, 1025, 2048, 2050, 5000]),
    seed=st.integers(0, 2**16),
    strange=st.lists(st.sampled_from([torch.nan, torch.inf, -torch.inf, 9.0]), max_size=3),
)
def test_largest(
    dtype: torch.dtype, rows: int, width: int, seed: int, strange: list[float]
) -> None:
    x = numbers(rows, width, dtype=dtype, seed=seed)
    for index, number in enumerate(strange):
        x[(seed + index) % rows, (seed * 7 + 13 * index) % width] = number
    values, places = fused.largest(x)
    torch.testing.assert_close(values, x.amax(dim=-1), rtol=0, atol=0, equal_nan=True)
    for row, value, place in zip(x, values.tolist(), places.tolist(), strict=True):
        if not row.isnan().any():
            assert row[place] == value == row.max()
            assert not (row[:place] == value).any(), "the first of equal ones"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_of_extremes(dtype: torch.dtype) -> None:
    gates = torch.tensor([0.0, -0.0, 3e38, -3e38, -90.0, 90.0, float("inf"), float("nan")])
    x = torch.cat((gates, torch.ones(8)))[None].to(dtype)
    expected = silu(x[0, :8].double())
    ours = fused.silu_mul(x)[0].double()
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-30, equal_nan=True)


def rotation(tokens: int, pairs: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = numbers(tokens, 1, pairs, dtype=torch.float64, seed=seed)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def assert_rotated(ours: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> None:
    """Two products may cancel, so the error is measured by what went in; what is not rotated stays
    as it is."""
    exact = apply_rope(x.double(), cos.double(), sin.double(), interleaved=interleaved)
    error = (ours.double() - exact).abs().max()
    assert error <= x.double().abs().max() * (2.0**-8 if ours.dtype == torch.bfloat16 else 1e-6)
    rest = 2 * cos.shape[-1]
    assert torch.equal(ours[..., rest:], x[..., rest:])


@settings(max_examples=100)
@given(
    tokens=ROWS,
    heads=st.integers(1, 4),
    pairs=st.integers(1, 40),
    rest=st.integers(0, 20),
    interleaved=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 2**16),
)
def test_rope_of_a_part_of_a_projection(
    tokens: int,
    heads: int,
    pairs: int,
    rest: int,
    interleaved: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    head_dim = 2 * pairs + rest
    projected = numbers(tokens, heads * head_dim + 5, dtype=dtype, seed=seed)
    x = projected[:, 5:].unflatten(1, (heads, head_dim))  # neither aligned nor contiguous
    cos, sin = rotation(tokens, pairs, seed + 1, dtype)
    ours = fused.rope(x, cos, sin, interleaved=interleaved)
    assert_rotated(ours, x, cos, sin, interleaved=interleaved)


@settings(max_examples=60)
@given(
    block_size=st.sampled_from([1, 3, 16]),
    window=st.sampled_from([None, (None, None, 3, 3), (2, 2, 5, 5)]),
    kv_cache_dtype=st.sampled_from(["auto", "int8"]),
    pairs=st.integers(0, 4),
    interleaved=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 2**16),
)
def test_heads_of_a_projection_are_rotated_and_stored(
    block_size: int,
    window: tuple[int | None, ...] | None,
    kv_cache_dtype: str,
    pairs: int,
    interleaved: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """As torch's own operations do it, one after the other; `pairs` 0 is no rotation."""
    layers = (HeadConfig(4, 2, 8, window=window), HeadConfig(2, 2, 12))
    config = tiny.llama(layers=layers, kv_cache_dtype=kv_cache_dtype)
    ours, theirs = (
        KVCache(config, num_pages=6, block_size=block_size, dtype=dtype, device=torch.device("cpu"))
        for _ in range(2)
    )
    tokens = min(5, 6 * block_size)
    cos, sin = rotation(tokens, pairs, seed + 1, dtype)
    for part, same in zip(
        *(itertools.chain(*cache.layers) for cache in (ours, theirs)), strict=True
    ):
        kv_heads, head_dim = len(part.part.kv_heads), part.part.head_dim
        each = (3, kv_heads, kv_heads)
        projected = numbers(tokens, sum(each), head_dim, dtype=dtype, seed=seed)
        before = projected.clone()
        slots = torch.randperm(6 * block_size)[:tokens]
        query, key, value = projected.split(each, dim=1)
        fused.rotate_and_store(
            query,
            key,
            value,
            (cos, sin) if pairs else None,
            part.pool,
            slots,
            part.places,
            interleaved=interleaved,
        )
        old_query, old_key, old_value = before.split(each, dim=1)
        assert_rotated(query, old_query, cos, sin, interleaved=interleaved)
        assert torch.equal(key, old_key)
        assert torch.equal(value, old_value)
        # The operation above equals `rope`, so that only the places are in question.
        rotated = fused.rope(old_key, cos, sin, interleaved=interleaved) if pairs else old_key
        same.write(rotated, old_value, slots)
    assert torch.equal(ours.pool, theirs.pool)


def test_takes_only_what_it_computes() -> None:
    x = torch.ones(2, 4)
    assert not fused.can_fuse(x)  # gradients would be lost
    with torch.no_grad():
        assert fused.can_fuse(x, x)
        assert fused.can_fuse(x.bfloat16())
        assert not fused.can_fuse(x, x.bfloat16())
        assert not fused.can_fuse(x.double())
        assert not fused.can_fuse(x.half())
        assert not fused.can_fuse(x.to("meta"))


def test_rows_without_elements_are_nothing() -> None:
    assert fused.rms_norm(torch.ones(2, 0), torch.ones(0), 1e-5).shape == (2, 0)
    assert fused.silu_mul(torch.ones(2, 0)).shape == (2, 0)


def rope(cos: Tensor, sin: Tensor) -> None:
    """Two tokens with a head of 4."""
    fused.rope(torch.ones(2, 1, 4), cos, sin, interleaved=False)


def store(
    *, slot: int = 0, heads: int = 2, pairs: int = 2, dtype: torch.dtype | None = None
) -> None:
    """One token, to a pool of two blocks of 16 tokens with 2 heads of 4."""
    key = torch.ones(1, heads, 4)
    turn = torch.ones(1, 1, pairs, dtype=dtype), torch.ones(1, 1, pairs, dtype=dtype)
    places = (0, 256, 256, 1, 2, 16)
    fused.rotate_and_store(
        key.clone(),
        key,
        key,
        turn,
        torch.zeros(512),
        torch.tensor([slot]),
        places,
        interleaved=False,
    )


def test_what_fits_is_not_refused() -> None:
    store()


@pytest.mark.parametrize(
    "call",
    [
        lambda: fused.rms_norm(torch.ones(2, 4), torch.ones(3), 1e-5),
        lambda: fused.silu_mul(torch.ones(2, 5)),
        lambda: fused.largest(torch.ones(2, 0)),
        lambda: fused.largest(torch.ones(2, 2, dtype=torch.float64)),
        lambda: rope(torch.ones(2, 1, 3), torch.ones(2, 1, 3)),
        lambda: rope(torch.ones(1, 1, 2), torch.ones(1, 1, 2)),
        lambda: rope(torch.ones(2, 1, 2), torch.ones(2, 1, 1)),
        lambda: fused.silu_mul(torch.ones(2, 4, dtype=torch.float64)),
        lambda: store(slot=-5),
        lambda: store(slot=32),
        lambda: store(heads=3),
        lambda: store(pairs=3),
        lambda: store(dtype=torch.bfloat16),
    ],
)
def test_what_does_not_fit_is_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(RuntimeError, match=r"allowed|elements|gate|heads|cosine|slot"):
        call()
