"""Batches as a kernel meets them: sequences scattered over the blocks of a cache."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.attention_metadata import AttentionMetadata, GroupMetadata
from models.config import HeadConfig, KVCacheDType
from models.kernels import KernelName, get_kernel
from models.kv_cache import CachePart, KVCache
from models.positions import Alibi
from tests.models import tiny
from tests.models.variants import Variant


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

    def heads(self, *, alibi: Alibi | None = None, causal: bool = True) -> HeadConfig:
        return HeadConfig(
            self.num_kv_heads * self.group,
            self.num_kv_heads,
            self.head_dim,
            alibi=alibi,
            causal=causal,
        )


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


def make_batch(
    case: Case, dtype: torch.dtype, *, stale: float = 0.0, kv_cache_dtype: KVCacheDType = "auto"
) -> Batch:
    """Scatter sequences over shuffled blocks of a cache that held `stale` before."""
    generator = torch.Generator().manual_seed(case.seed)
    size = case.block_size
    lengths = [computed + new for computed, new in case.sequences]
    num_blocks = sum(-(-length // size) for length in lengths) + 2
    free = torch.randperm(num_blocks, generator=generator).tolist()
    tables = [[free.pop() for _ in range(-(-length // size))] for length in lengths]
    heads = case.heads()
    cache = KVCache(
        tiny.gpt2(layers=(heads,), kv_cache_dtype=kv_cache_dtype),
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
