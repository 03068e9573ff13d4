"""All kernels that read the paged cache agree with each other and with loops over float64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.attention_metadata import AttentionMetadata, GroupMetadata
from models.config import HeadConfig
from models.errors import ConfigError
from models.kernels import KernelName, get_kernel, resolve_kernel
from models.kv_cache import CachePart, KVCache
from models.transformer import Transformer
from tests.models import tiny
from tests.models.variants import EACH_HEAD, PLAIN, Variant, variants

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
    tokens_per_gather: int = 2**20


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
        tokens_per_gather=draw(st.sampled_from([1, 16, 50, 2**20])),
    )


def heads_of(case: Case) -> st.SearchStrategy[tuple[Case, Variant]]:
    return variants(case.num_kv_heads * case.group).map(lambda variant: (case, variant))


VARIED_CASES = cases().flatmap(heads_of)


@dataclass(frozen=True)
class Batch:
    """A case as tensors; `spans` are the rows of each sequence, `keys` and `values` its own."""

    query: Tensor
    cache: CachePart
    metadata: GroupMetadata
    spans: list[slice]
    keys: list[Tensor]
    values: list[Tensor]

    def run(self, kernel: KernelName, variant: Variant) -> Tensor:
        return get_kernel(kernel)(self.query, self.cache, self.metadata, variant.scoring())


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
        num_pages=num_blocks,
        block_size=size,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    cache.pool.fill_(stale)
    ((part,),) = cache.layers
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for table, length in zip(tables, lengths, strict=True):
        shape = (2, length, case.num_kv_heads, case.head_dim)
        key, value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        slots = [table[at // size] * size + at % size for at in range(length)]
        part.write(key, value, torch.tensor(slots))
        keys.append(key)
        values.append(value)
    ends = np.cumsum([new for _, new in case.sequences]).tolist()
    query = torch.randn(
        (ends[-1], heads.num_heads, heads.head_dim), generator=generator, dtype=torch.float64
    )
    metadata = AttentionMetadata.build(
        block_tables=[[table] for table in tables],
        num_computed_tokens=[computed for computed, _ in case.sequences],
        num_new_tokens=[new for _, new in case.sequences],
        block_size=size,
        device=torch.device("cpu"),
        tokens_per_gather=[case.tokens_per_gather],
    )
    return Batch(
        query=query.to(dtype),
        cache=part,
        metadata=metadata.groups[0],
        spans=[slice(end - new, end) for end, (_, new) in zip(ends, case.sequences, strict=True)],
        keys=keys,
        values=values,
    )


EVERYTHING = Case(2, 3, 8, 4, ((16, 1), (0, 1), (3, 1), (4, 1), (0, 8), (3, 5), (12, 2)), seed=1)


@settings(max_examples=200)
@given(varied=VARIED_CASES)
@example(varied=(EVERYTHING, PLAIN))
@example(varied=(EVERYTHING, EACH_HEAD))
def test_dense_equals_reference(varied: tuple[Case, Variant]) -> None:
    case, variant = varied
    batch = make_batch(case, torch.float32)
    assert (batch.run("dense", variant) - batch.run("reference", variant)).abs().max() <= 2e-6


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=80)
@given(varied=VARIED_CASES)
@example(varied=(EVERYTHING, PLAIN))
@example(varied=(EVERYTHING, EACH_HEAD))
def test_every_kernel_equals_loops_over_each_sequence_alone(
    kernel: KernelName, varied: tuple[Case, Variant]
) -> None:
    case, variant = varied
    batch = make_batch(case, torch.float64)
    output = batch.run(kernel, variant).numpy()
    for span, key, value in zip(batch.spans, batch.keys, batch.values, strict=True):
        expected = variant.expected(batch.query[span].numpy(), key.numpy(), value.numpy())
        assert np.abs(output[span] - expected.output).max() <= 1e-12


# Attention of one query has a path of its own in half precision.
@settings(max_examples=150)
@given(varied=VARIED_CASES)
@example(varied=(EVERYTHING, PLAIN))
@example(varied=(EVERYTHING, EACH_HEAD))
def test_in_bfloat16_a_query_errs_at_most_twice_as_much_as_eager_attention(
    varied: tuple[Case, Variant],
) -> None:
    case, variant = varied
    batch = make_batch(case, torch.bfloat16)
    exact = Batch(
        batch.query.double(), batch.cache, batch.metadata, batch.spans, batch.keys, batch.values
    )
    output = batch.run("dense", variant)
    eager = batch.run("reference", variant)
    for span, key, value in zip(batch.spans, batch.keys, batch.values, strict=True):
        expected = variant.expected(
            exact.query[span].numpy(), key.double().numpy(), value.double().numpy()
        ).output
        theirs = np.abs(eager[span].double().numpy() - expected).max()
        ours = np.abs(output[span].double().numpy() - expected).max()
        # Two roundings are allowed where eager attention happens to be nearly exact.
        assert ours <= max(2 * theirs, 2**-7 * value.abs().max().item())


# A cache is reused without being cleared: whatever finite numbers an earlier sequence left behind
# the end of this one must have no weight at all.
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "stale"),
    [
        *((torch.float32, stale) for stale in (1e30, -1e30)),
        *((torch.bfloat16, stale) for stale in (1e30, -1e30)),
        *((torch.float16, stale) for stale in (6e4, -6e4)),  # times a query it overflows
    ],
)
@settings(max_examples=60)
@given(varied=VARIED_CASES)
@example(varied=(EVERYTHING, PLAIN))
@example(varied=(EVERYTHING, EACH_HEAD))
def test_stale_content_behind_a_sequence_changes_nothing(
    kernel: KernelName, dtype: torch.dtype, stale: float, varied: tuple[Case, Variant]
) -> None:
    case, variant = varied
    clean = make_batch(case, dtype).run(kernel, variant)
    assert torch.equal(make_batch(case, dtype, stale=stale).run(kernel, variant), clean)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scale_is_the_callers(kernel: KernelName) -> None:
    batch = make_batch(EVERYTHING, torch.float64)
    outputs = [batch.run(kernel, Variant(scales=scale)) for scale in (0.05, 0.7)]
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


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
