"""Attention as it is defined, one sequence after the other. Slow, and the meaning of all others."""

import torch
from torch import Tensor

from models.kv_cache import AttentionMetadata, LayerCache


def reference_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal softmax(Q Kᵀ · scale) V (Vaswani et al. 2017); the last query sees all keys.

    Args:
        query: `[queries, heads, head_dim]`.
        key, value: `[keys, kv_heads, head_dim]`, `keys >= queries`.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    num_queries, num_keys = scores.shape[-2:]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    scores = scores.masked_fill(~visible.tril(num_keys - num_queries), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value)


def paged_attention(
    query: Tensor, cache: LayerCache, metadata: AttentionMetadata, scale: float
) -> Tensor:
    output = torch.empty_like(query)
    decode_lens = metadata.decode_mask.sum(dim=-1).flatten().tolist()
    for row, seq_len in enumerate(decode_lens):
        key, value = _read(cache, metadata.decode_block_tables[row], seq_len)
        output[row] = reference_attention(query[row : row + 1], key, value, scale)[0]
    for span in metadata.prefills:
        key, value = _read(cache, span.block_table, span.seq_len)
        output[span.start : span.end] = reference_attention(
            query[span.start : span.end], key, value, scale
        )
    return output


def _read(cache: LayerCache, block_table: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, each `[seq_len, kv_heads, head_dim]`."""
    key, value = cache.gather(block_table)
    return key.transpose(0, 1)[:seq_len], value.transpose(0, 1)[:seq_len]
