"""Rotation and the write to the cache in Triton, by its interpreter: what torch does in steps."""

import importlib.util
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import HeadConfig
from models.kernels import paged_triton
from models.kv_cache import KVCache
from models.rope import apply_rope
from tests.models import tiny
from tests.models.kernels import CPU

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@settings(max_examples=20)
@given(
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    head_dim=st.sampled_from([2, 6, 8, 12, 16]),
    pairs=st.integers(0, 8),
    block_size=st.sampled_from([1, 3, 16]),
    window=st.booleans(),
    interleaved=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_it_is_rotation_and_then_a_write(
    heads: tuple[int, int],
    head_dim: int,
    pairs: int,
    block_size: int,
    window: bool,
    interleaved: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """`pairs` 0 is no rotation; windows of single heads put them into other places."""
    num_kv_heads, group = heads
    pairs = min(pairs, head_dim // 2)
    windows = tuple(3 if window and head < group else None for head in range(num_kv_heads * group))
    layers = (HeadConfig(num_kv_heads * group, num_kv_heads, head_dim, window=windows),)
    config = tiny.llama(layers=layers)
    ours, theirs = (
        KVCache(config, num_pages=6, block_size=block_size, dtype=dtype, device=CPU)
        for _ in range(2)
    )
    generator = torch.Generator().manual_seed(seed)
    tokens = min(5, 6 * block_size)
    angles = 10 * torch.rand(tokens, 1, pairs, generator=generator)
    rotation = (angles.cos().to(dtype), angles.sin().to(dtype)) if pairs else None
    for part, same in zip(
        *(itertools.chain(*cache.layers) for cache in (ours, theirs)), strict=True
    ):
        own = len(part.part.kv_heads)
        each = (own * group, own, own)
        shape = (tokens, sum(each), head_dim)
        projected = torch.randn(shape, generator=generator).to(dtype)
        before = projected.clone()
        slots = torch.randperm(6 * block_size, generator=generator)[:tokens]
        given_query, given_key, given_value = projected.split(each, dim=1)
        paged_triton.rotate_and_store(
            given_query,
            given_key,
            given_value,
            rotation,
            part.pool,
            slots,
            part.places,
            interleaved=interleaved,
        )
        query, key, value = before.double().split(each, dim=1)
        if rotation is not None:
            cos, sin = (table.double() for table in rotation)
            query, key = (apply_rope(x, cos, sin, interleaved=interleaved) for x in (query, key))
        exact = query.to(dtype)
        # Of two roundings, one may be the other way.
        assert (projected[:, : each[0]] - exact).abs().max() <= torch.finfo(dtype).eps * 4
        assert torch.equal(projected[:, each[0] :], before[:, each[0] :])
        same.write(key.to(dtype), value.to(dtype), slots)
    assert (ours.pool - theirs.pool).abs().max() <= torch.finfo(dtype).eps * 4
    assert torch.equal(ours.pool == 0, theirs.pool == 0), "nothing else is written"


def test_a_model_writes_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = paged_triton.rotate_and_store

    def counted(*args: object, **kwargs: object) -> None:
        calls.append(1)
        plain(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(paged_triton, "rotate_and_store", counted)
    monkeypatch.setattr("models.cpu.fused.why_unavailable", lambda: "another processor")
    config = tiny.llama(layers=(HeadConfig(4, 2, 8), HeadConfig(4, 1, 8)))
    tokens = torch.arange(12)
    model = tiny.model(config, kernel="paged_triton")
    (logits,) = tiny.paged_logits(model, [tokens], [[9], [1], [2]])
    assert len(calls) == 3 * 2, "once for each step and layer"
    assert (logits - model.logits(tokens[None])[0]).abs().max() <= 1e-5
    assert math.isfinite(logits.sum().item())
