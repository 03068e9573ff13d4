"""Attention by torch's scaled_dot_product_attention; runs wherever torch runs.

Decodes become padded calls: blocks are gathered to a rectangle and the query heads that share
a key/value head become its query axis, so each key/value head is read once, not once per query
head. Prefill chunks are one call per sequence.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from models.attention_metadata import GroupMetadata
from models.kernels.reference import weigh
from models.kv_cache import CachePart
from models.scoring import Scoring


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """The output of `reference.attend`, computed without the weights where torch can.

    Args:
        is_causal: query i sees keys 0 to i; `visible` must then be None.

    Returns:
        `[batch, heads, queries, value_dim]`.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    if scoring.softcap is not None or (bias is not None and half):
        # A bias that grows with the position needs more digits than torch would keep here.
        return _attend_by_scores(query, key, value, scoring, visible, bias, is_causal=is_causal)
    if isinstance(scoring.scale, Tensor):
        query, scale = query * scoring.head_scale(query, dims=2), 1.0
    else:
        scale = scoring.scale
    if scoring.sinks is not None and is_causal:
        is_causal, visible = False, _causal(query.shape[2], query.device)
    mask = _mask(visible, bias, query.dtype)
    if scoring.sinks is not None:
        key, value, mask = _with_sink(query, key, value, mask, scoring.sinks)
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    folded = query.shape[2] == 1 and num_heads != num_kv_heads
    if folded:
        query = query.unflatten(1, (num_kv_heads, -1)).squeeze(3)
        if mask is not None and mask.shape[1] != 1:
            mask = mask.unflatten(1, (num_kv_heads, -1)).squeeze(3)
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=not folded and num_heads != num_kv_heads,
    )
    return output.flatten(1, 2)[:, :, None] if folded else output


def paged_attention(
    query: Tensor, cache: CachePart, metadata: GroupMetadata, scoring: Scoring
) -> Tensor:
    outputs: list[Tensor] = []
    for batch in metadata.batches:
        key, value = cache.gather(batch.block_tables)
        if batch.whole_length is not None and scoring.is_plain(batch.whole_length):
            length = batch.whole_length
            output = attend(
                batch.unpack(query),
                key[:, :, :length],
                value[:, :, :length],
                scoring,
                is_causal=length > 1,
            )
        else:
            queries = batch.unpack(query)
            visible, bias = batch.mask(scoring)
            if _is_small(queries, scoring):
                output = _attend_by_products(queries, key, value, scoring, visible)
            else:
                output = attend(queries, key, value, scoring, visible=visible, bias=bias)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _is_small(query: Tensor, scoring: Scoring) -> bool:
    """Whether torch's fused kernel, in half precision on a CPU, takes up to four times as long as
    two products."""
    return (
        query.shape[2] == 1
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.device.type == "cpu"
        and scoring.softcap is None
        and scoring.alibi is None
        and scoring.sinks is None
    )


def _attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, visible: Tensor
) -> Tensor:
    """One query for each sequence, which sees itself at least. Scores are rounded to the type of
    the query, as in eager attention."""
    query = query * scoring.head_scale(query, dims=2)
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    scores = grouped @ key.transpose(-1, -2)
    if visible.shape[1] != 1:
        visible = visible.squeeze(2).view(scores.shape)
    # Filled, not added to: the score of a hidden key may have overflowed.
    scores.masked_fill_(~visible, float("-inf"))
    output: Tensor = scores.softmax(dim=-1) @ value
    return output.flatten(1, 2)[:, :, None]


def _attend_by_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    visible: Tensor | None,
    bias: Tensor | None,
    *,
    is_causal: bool,
) -> Tensor:
    """For what scaled_dot_product_attention cannot say, or not with enough digits; one product
    for each key/value head."""
    if is_causal:
        visible = _causal(query.shape[2], query.device)
    batch, num_heads, num_queries, _ = query.shape
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (grouped @ key.transpose(-1, -2)).view(batch, num_heads, num_queries, -1)
    weights, _ = weigh(scores, scoring, visible=visible, bias=bias)
    read = weights.to(value.dtype).view(*grouped.shape[:3], -1) @ value
    return read.view(batch, num_heads, num_queries, -1)


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def _mask(visible: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if bias is None:
        return visible
    bias = bias.to(dtype)
    return bias if visible is None else bias.masked_fill(~visible, float("-inf"))


def _with_sink(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A key of zeros behind the others, whose score is the sink's logit and whose value is 0."""
    if mask is None:
        mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    sink = sinks.to(query.dtype).view(-1, 1, 1)
    shape = (mask.shape[0], query.shape[1], query.shape[2])
    mask = torch.cat((mask.expand(*shape, -1), sink.expand(*shape, 1)), dim=-1)
    return pad(key, (0, 0, 0, 1)), pad(value, (0, 0, 0, 1)), mask
