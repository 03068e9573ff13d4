"""Attention as it is defined. Slow, and the meaning of all others."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.attention_metadata import GroupMetadata
from models.kv_cache import CachePart
from models.scoring import Scoring


class Attended(NamedTuple):
    """What queries read, and how they looked.

    Attributes:
        output: `[batch, heads, queries, value_dim]`.
        weights: `[batch, heads, queries, keys]`, rows sum to 1, or to less where a sink takes
            part; all 0 for a query that sees nothing.
        lse: `[batch, heads, queries]`, logarithm of the sum of the exponentiated scores, the
            sink's not included; -inf for a query that sees nothing.
    """

    output: Tensor
    weights: Tensor
    lse: Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
) -> Attended:
    """softmax(Q Kᵀ · scale) V (Vaswani et al. 2017) with everything that `scoring` adds.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, kv_heads, keys, head_dim or value_dim]`; query head `h` reads
            key/value head `h // (heads / kv_heads)`.
        visible: bool `[batch or 1, heads or 1, queries or 1, keys]`; None lets all see all.
        bias: added to the scaled scores, of such a shape too.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-1, -2)
    weights, lse = weigh(scores, scoring, visible=visible, bias=bias)
    return Attended(weights.to(value.dtype) @ value, weights, lse)


def weigh(
    scores: Tensor,
    scoring: Scoring,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp of raw scores `[batch, heads, queries, keys]`, at least float32."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores * scoring.head_scale(scores, dims=2)
    if scoring.softcap is not None:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    if scoring.sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        sinks = scoring.sinks.to(scores).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    blind = lse == float("-inf")  # the softmax of nothing is not a number
    return weights.masked_fill(blind[..., None], 0.0), lse


def paged_attention(
    query: Tensor, cache: CachePart, metadata: GroupMetadata, scoring: Scoring
) -> Tensor:
    outputs: list[Tensor] = []
    for batch in metadata.batches:
        key, value = cache.gather(batch.block_tables)
        attended = attend(
            batch.unpack(query),
            key,
            value,
            scoring,
            visible=scoring.visible(batch.query_positions, batch.key_positions),
            bias=scoring.bias(batch.key_positions),
        )
        outputs.append(attended.output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)
