"""Keys and values of 8 bits: what they lose is what their scales say, by every kernel alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from models.config import HeadConfig
from models.errors import ConfigError
from models.kernels import KernelName
from models.kv_cache import KVCache, round_to_int8
from tests.models import tiny
from tests.models.batches import Case, make_batch
from tests.models.kernels import CPU, computes, needs_library
from tests.models.variants import Variant, variants


@settings(max_examples=100)
@given(
    width=st.integers(1, 40),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
    seed=st.integers(0, 2**16),
)
def test_a_row_is_rounded_to_half_a_step_of_its_scale(width: int, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = size * torch.randn(3, 2, width, generator=generator)
    whole, scale = round_to_int8(x)
    assert whole.dtype == torch.int8
    assert scale.shape == x.shape[:-1]
    assert torch.equal(scale, x.abs().amax(dim=-1) / 127)
    error = (whole.double() * scale.double()[..., None] - x.double()).abs()
    assert bool((error <= scale.double()[..., None] * 0.50001).all())
    assert bool((whole.abs().amax(dim=-1) == 127).all())


def test_nothing_and_what_is_no_number() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-40, 0.0], [torch.nan, 1.0], [torch.inf, 1.0]])
    whole, scale = round_to_int8(x)
    assert whole.tolist() == [[0, 0]] * 4
    assert scale[0] == 0
    assert not scale[2:].isfinite().any()


@pytest.mark.parametrize("window", [None, (3, None, None, 5)])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_what_is_written_is_read_back_to_its_scale(
    window: tuple[int | None, ...] | None, block_size: int
) -> None:
    layers = (HeadConfig(4, 4, 8, window=window), HeadConfig(4, 2, 12))
    config = tiny.gpt2(layers=layers, kv_cache_dtype="int8")
    cache = KVCache(config, num_pages=9, block_size=block_size, dtype=torch.bfloat16, device=CPU)
    assert cache.pool.dtype == torch.int8
    written = []
    for index, part in enumerate(part for parts in cache.layers for part in parts):
        group = cache.layout.groups[part.part.group]
        blocks = (2 - part.part.group) * 3 * group.blocks_per_page + torch.tensor([2, 0, 1])
        slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
        shape = (2, len(slots), len(part.part.kv_heads), part.part.head_dim)
        generator = torch.Generator().manual_seed(index)
        key, value = (3 * torch.randn(shape, generator=generator)).bfloat16()
        part.write(key, value, slots)
        written.append((part, blocks, key, value, slots))
    for part, blocks, *both, slots in written:
        for read, wanted in zip(part.gather(blocks[None]), both, strict=True):
            assert read.dtype == torch.bfloat16
            wide = wanted.double()
            step = wide.abs().amax(dim=-1, keepdim=True) / 127
            error = (read[0].transpose(0, 1).double() - wide).abs()
            assert bool((error <= 0.501 * step + wide.abs() * 2.0**-8).all())
        part.clear(slots[:1])
        key, _ = part.gather(blocks[None])
        assert not key[0, :, 0].any()
        assert key[0, :, 1:].any(dim=-1).all()
        # Masked positions are multiplied by 0, so what nobody owns any more must be finite.
        poison = torch.full_like(both[0][:1], torch.nan)
        part.write(poison, poison, slots[1:2])
        assert not all(read.isfinite().all() for read in part.gather(blocks[None]))
        part.clear(slots[1:2])
        assert all(read.isfinite().all() for read in part.gather(blocks[None]))


def test_bytes_are_those_of_rows_and_scales() -> None:
    heads = HeadConfig(4, 2, 64)
    plain = tiny.gpt2(layers=(heads, heads), dtype="bfloat16")
    config = plain.replace(kv_cache_dtype="int8")
    assert config.kv_bytes_per_token() == 2 * 2 * 2 * (64 + 4)
    assert plain.kv_bytes_per_token() == 2 * 2 * 2 * 128
    assert config.kv_bytes(10) == 10 * config.kv_bytes_per_token()
    cache = KVCache(config, num_pages=5, block_size=16, dtype=torch.bfloat16, device=CPU)
    assert cache.nbytes == 5 * 16 * config.kv_bytes_per_token()


def test_heads_whose_scales_would_lie_nowhere_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"allowed: auto, because head_dim is 6") as caught:
        tiny.gpt2(layers=(HeadConfig(4, 2, 6),), kv_cache_dtype="int8")
    assert caught.value.field == "kv_cache_dtype"


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, Variant]:
    decodes = draw(st.lists(st.tuples(st.integers(0, 300), st.just(1)), max_size=3))
    chunks = draw(st.lists(st.tuples(st.integers(0, 100), st.integers(2, 70)), max_size=2))
    case = Case(
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 12])),
        head_dim=draw(st.sampled_from([4, 8, 12, 16, 36, 64, 80, 128, 256])),
        block_size=draw(st.sampled_from([1, 5, 16, 100])),
        sequences=(*decodes, *chunks) or ((70, 1),),
        seed=draw(st.integers(0, 2**16)),
    )
    return case, draw(variants(case.num_kv_heads * case.group))


@needs_library
@settings(max_examples=150)
@given(varied=cases())
def test_the_kernel_in_c_equals_the_reference(varied: tuple[Case, Variant]) -> None:
    case, variant = varied
    assume(computes("paged_cpu", case, variant, torch.float32))
    batch = make_batch(case, torch.float32, kv_cache_dtype="int8")
    ours, theirs = batch.run("paged_cpu", variant), batch.run("reference", variant)
    # A score is rounded in proportion to its size, and a weight errs by as much as its score.
    longest = [rows.norm(dim=-1).max().item() for rows in (batch.query, *batch.keys)]
    largest_score = np.max(variant.scales) * longest[0] * max(longest[1:])
    bound = 5e-6 + 5e-8 * largest_score
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max().clamp(min=1)


@needs_library
@settings(max_examples=60)
@given(varied=cases())
def test_in_bfloat16_it_is_as_near_as_rounding_allows(varied: tuple[Case, Variant]) -> None:
    case, variant = varied
    assume(computes("paged_cpu", case, variant, torch.bfloat16))
    batch = make_batch(case, torch.bfloat16, kv_cache_dtype="int8")
    wide = replace(make_batch(case, torch.float32), query=batch.query.float())
    # The keys and values that the cache of 8 bits holds, in float32.
    wide.cache.pool.zero_()
    slots = torch.arange(wide.cache.pool.numel() // (2 * case.num_kv_heads * case.head_dim))
    key, value = batch.cache.gather(torch.arange(len(slots) // case.block_size)[None])
    wide.cache.write(key[0].transpose(0, 1).float(), value[0].transpose(0, 1).float(), slots)
    exact = wide.run("reference", variant)
    # Gathered numbers are rounded to bfloat16 once more, which the kernel in C++ does without.
    error = (batch.run("paged_cpu", variant).float() - exact).abs().max()
    assert error <= 0.03 * value.abs().max()


@pytest.mark.parametrize("kernel", ["auto", "dense", "reference"])
def test_a_model_on_it_is_near_to_the_model_without(kernel: KernelName) -> None:
    heads = (HeadConfig(4, 2, 8), HeadConfig(4, 4, 8, window=(5, None, 9, 9)))
    plain = tiny.model(tiny.llama(layers=heads), kernel=kernel)
    tokens = [torch.arange(3, 40)]
    (exact,) = tiny.paged_logits(plain, tokens, [[37]])
    rounded = tiny.model(tiny.llama(layers=heads, kv_cache_dtype="int8"), kernel=kernel)
    (one_shot,) = tiny.paged_logits(rounded, tokens, [[37]])
    (stepwise,) = tiny.paged_logits(rounded, tokens, [[20], *[[1]] * 17])
    difference = (one_shot - exact).abs().max()
    assert 0 < difference <= 0.05 * exact.abs().max()
    assert (one_shot - stepwise).abs().max() <= 1e-5
