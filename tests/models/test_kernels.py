"""All kernels agree with the definition, and the definition with loops over float64 numbers."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.config import HeadConfig
from models.errors import ConfigError
from models.kernels import KernelName, get_kernel, resolve_kernel
from models.kernels.dense import causal_attention
from models.kernels.reference import reference_attention
from models.kv_cache import AttentionMetadata, KVCache, LayerCache
from models.transformer import Transformer
from tests.models import numpy_oracle, tiny

KERNELS: tuple[KernelName, ...] = ("dense", "reference")


@dataclass(frozen=True)
class Case:
    """A batch: `(tokens in the cache, new tokens)` of each sequence, decodes first."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    sequences: tuple[tuple[int, int], ...]
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    decodes = draw(st.lists(st.tuples(st.integers(0, 20), st.just(1)), max_size=4))
    chunks = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(2, 9)), max_size=3))
    if not decodes and not chunks:
        chunks = [(0, 2)]
    return Case(
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([1, 2, 3, 8, 16])),
        block_size=draw(st.sampled_from([1, 2, 3, 4, 16])),
        sequences=(*decodes, *chunks),
        seed=draw(st.integers(0, 2**16)),
    )


@dataclass(frozen=True)
class Batch:
    """A case as tensors; `spans` are the rows of each sequence, `keys` and `values` its own."""

    query: Tensor
    cache: LayerCache
    metadata: AttentionMetadata
    spans: list[slice]
    keys: list[Tensor]
    values: list[Tensor]
    scale: float

    def run(self, kernel: KernelName) -> Tensor:
        return get_kernel(kernel)(self.query, self.cache, self.metadata, self.scale)


def make_batch(case: Case, dtype: torch.dtype, *, stale: float = 0.0) -> Batch:
    """Scatter sequences over shuffled blocks of a cache that held `stale` before."""
    generator = torch.Generator().manual_seed(case.seed)
    size = case.block_size
    lengths = [computed + new for computed, new in case.sequences]
    num_blocks = sum(-(-length // size) for length in lengths) + 2
    free = torch.randperm(num_blocks, generator=generator).tolist()
    tables = [[free.pop() for _ in range(-(-length // size))] for length in lengths]
    heads = HeadConfig(case.num_kv_heads * case.group, case.num_kv_heads, case.head_dim)
    cache = KVCache(
        tiny.gpt2(layers=(heads,)),
        num_blocks=num_blocks,
        block_size=size,
        dtype=dtype,
        device=torch.device("cpu"),
    ).layers[0]
    for tensor in (cache.key, cache.value):
        tensor.fill_(stale)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for table, length in zip(tables, lengths, strict=True):
        shape = (2, length, case.num_kv_heads, case.head_dim)
        key, value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        slots = [table[at // size] * size + at % size for at in range(length)]
        cache.write(key, value, torch.tensor(slots))
        keys.append(key)
        values.append(value)
    ends = np.cumsum([new for _, new in case.sequences]).tolist()
    query = torch.randn(
        (ends[-1], heads.num_heads, heads.head_dim), generator=generator, dtype=torch.float64
    )
    return Batch(
        query=query.to(dtype),
        cache=cache,
        metadata=AttentionMetadata.build(
            block_tables=tables,
            num_computed_tokens=[computed for computed, _ in case.sequences],
            num_new_tokens=[new for _, new in case.sequences],
            block_size=size,
            device=torch.device("cpu"),
        ),
        spans=[slice(end - new, end) for end, (_, new) in zip(ends, case.sequences, strict=True)],
        keys=keys,
        values=values,
        scale=heads.softmax_scale,
    )


EVERYTHING = Case(2, 3, 8, 4, ((16, 1), (0, 1), (3, 1), (4, 1), (0, 8), (3, 5), (12, 2)), seed=1)


@settings(max_examples=200)
@given(case=cases())
@example(case=EVERYTHING)
def test_dense_equals_reference(case: Case) -> None:
    batch = make_batch(case, torch.float32)
    assert (batch.run("dense") - batch.run("reference")).abs().max() <= 2e-6


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40)
@given(case=cases())
@example(case=EVERYTHING)
def test_every_kernel_equals_loops_over_each_sequence_alone(kernel: KernelName, case: Case) -> None:
    batch = make_batch(case, torch.float64)
    output = batch.run(kernel).numpy()
    for span, key, value in zip(batch.spans, batch.keys, batch.values, strict=True):
        expected = numpy_oracle.attention(batch.query[span], key, value, batch.scale)
        assert np.abs(output[span] - expected).max() <= 1e-12


# A cache is reused without being cleared: whatever finite numbers an earlier sequence left behind
# the end of this one must have no weight at all.
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("stale", [1e30, -1e30])
@settings(max_examples=100)
@given(case=cases())
@example(case=EVERYTHING)
def test_stale_content_behind_a_sequence_changes_nothing(
    kernel: KernelName, stale: float, case: Case
) -> None:
    clean = make_batch(case, torch.float32).run(kernel)
    assert torch.equal(make_batch(case, torch.float32, stale=stale).run(kernel), clean)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scale_is_the_callers(kernel: KernelName) -> None:
    batch = make_batch(EVERYTHING, torch.float64)
    for scale in (0.05, 0.7):
        output = replace(batch, scale=scale).run(kernel).numpy()
        for span, key, value in zip(batch.spans, batch.keys, batch.values, strict=True):
            expected = numpy_oracle.attention(batch.query[span], key, value, scale)
            assert np.abs(output[span] - expected).max() <= 1e-12


@settings(max_examples=60)
@given(
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([1, 3, 8]),
    num_queries=st.integers(1, 7),
    num_cached=st.integers(0, 7),
    seed=st.integers(0, 2**16),
)
def test_attention_without_a_cache_equals_loops(
    num_kv_heads: int, group: int, head_dim: int, num_queries: int, num_cached: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(2, *shape, head_dim, generator=generator, dtype=torch.float64)

    query = random(num_queries, num_kv_heads * group)
    key, value = (random(num_cached + num_queries, num_kv_heads) for _ in range(2))
    expected = np.stack(
        [numpy_oracle.attention(query[i], key[i], value[i], 0.37) for i in range(2)]
    )
    fused = _causal(query, key, value, 0.37)
    assert fused.shape == query.shape
    assert np.abs(fused.numpy() - expected).max() <= 1e-12
    for i in range(2):
        plain = reference_attention(query[i], key[i], value[i], 0.37)
        assert np.abs(plain.numpy() - expected[i]).max() <= 1e-12


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The fused form, with tokens before heads as the oracle has them."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return causal_attention(query, key, value, scale).transpose(1, 2)


def test_large_scores_do_not_overflow() -> None:
    query, key, value = 200 * torch.randn(3, 1, 6, 2, 8)
    expected = numpy_oracle.attention(query[0], key[0], value[0], 1.0)
    for output in (
        _causal(query, key, value, 1.0)[0],
        reference_attention(query[0], key[0], value[0], 1.0),
    ):
        assert np.abs(output.numpy() - expected).max() <= 1e-2 * np.abs(expected).max()


def test_auto_is_a_kernel_and_names_stay_as_they_are() -> None:
    assert resolve_kernel("auto") in KERNELS
    assert [resolve_kernel(name) for name in KERNELS] == list(KERNELS)
    assert get_kernel("dense") is not get_kernel("reference")


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    unknown: KernelName = "flash"  # type: ignore[assignment]
    for use in (
        lambda: resolve_kernel(unknown),
        lambda: get_kernel(unknown),
        lambda: Transformer(tiny.llama(), kernel=unknown),
    ):
        with pytest.raises(ConfigError) as caught:
            use()
        assert caught.value.field == "kernel"
        assert str(caught.value) == "kernel is 'flash'; allowed: auto, dense, reference"
