"""Attention by torch's scaled_dot_product_attention; runs wherever torch runs.

Decodes become one padded call: blocks are gathered to a rectangle and the query heads that share
a key/value head become its query axis, so each key/value head is read once, not once per query
head. Prefill chunks are one call per sequence.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from models.kv_cache import AttentionMetadata, LayerCache


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention without a cache; the last query sees all keys.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, kv_heads, keys, head_dim]`, `keys >= queries`.

    Returns:
        `[batch, heads, queries, head_dim]`.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = None
    if num_queries not in (1, num_keys):
        # torch aligns is_causal to the top left; with a cached prefix the bottom right is meant.
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = visible.tril(num_keys - num_queries)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=num_queries == num_keys and num_queries > 1,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """One query per sequence.

    Args:
        query: `[seqs, heads, head_dim]`.
        key, value: `[seqs, kv_heads, keys, head_dim]`.
        mask: bool `[seqs, 1, 1, keys]`.
    """
    num_seqs, num_heads, head_dim = query.shape
    grouped = query.view(num_seqs, key.shape[1], -1, head_dim)
    return scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale).reshape(
        num_seqs, num_heads, head_dim
    )


def paged_attention(
    query: Tensor, cache: LayerCache, metadata: AttentionMetadata, scale: float
) -> Tensor:
    output = torch.empty_like(query)
    num_decodes = metadata.num_decodes
    if num_decodes:
        key, value = cache.gather(metadata.decode_block_tables)
        output[:num_decodes] = decode_attention(
            query[:num_decodes], key, value, metadata.decode_mask, scale
        )
    for span in metadata.prefills:
        key, value = cache.gather(span.block_table)
        output[span.start : span.end] = causal_attention(
            query[None, span.start : span.end].transpose(1, 2),
            key[None, :, : span.seq_len],
            value[None, :, : span.seq_len],
            scale,
        )[0].transpose(0, 1)
    return output
