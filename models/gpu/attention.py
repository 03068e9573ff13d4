"""Attention over the paged cache, in Triton.

One program computes some queries that share a key/value head (rows) against one span of keys; a
second kernel joins the spans. Decodes and chunks of prompts are the same to it: rows are all query
heads of a group, token after token, so a multi-query model fills the rows of a tile with the heads
of one token, and a multi-head one pads them.

Spans lie at fixed positions, so that what a query reads does not depend on the other sequences of a
step (Flash-Decoding, Dao et al. 2023, splits by what is left over instead). How many spans are
launched may be more than there are: those behind the end do nothing, so that one recorded launch
serves sequences of any length up to a bound.
"""

# Loops over pointers and masks are how Triton is written; types of its values are its own.
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

import triton
import triton.language as tl

from models.gpu.launch import await_previous

_LOG2_E = tl.constexpr(1.4426950408889634)
# The running maximum before any key is seen; finite, so that differences are numbers.
_NOTHING = tl.constexpr(-1e30)


@triton.jit
def attend_spans(
    query,
    pool,
    block_tables,
    query_start,
    num_computed,
    tile_seq,
    tile_row,
    scales,
    windows,
    slopes,
    partial_read,
    partial_highest,
    partial_sum,
    query_token_stride,
    query_head_stride,
    max_blocks,
    offset,
    page_elements,
    block_elements,
    blocks_per_page,
    sink_tokens,
    softcap,
    num_spans,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    wide_dim: tl.constexpr,
    rows: tl.constexpr,
    keys: tl.constexpr,
    span: tl.constexpr,
    has_softcap: tl.constexpr,
    has_slopes: tl.constexpr,
    precision: tl.constexpr,
    overlaps: tl.constexpr,
):
    """Of each row of a tile and one span: highest score, sum of weights, weighted values.

    A sequence with `num_computed` -1 is none: its row of queries reads nothing.

    Args:
        query: `[tokens, heads, head_dim]`; the last axis is contiguous.
        tile_seq, tile_row: the sequence of each tile, and its first row within it.
        scales, windows, slopes: of each query head.
        partial_read: `[tiles, kv_heads, spans, rows, wide_dim]` float32; the next two without
            the last axis.
    """
    await_previous(overlaps)
    tile, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq = tl.load(tile_seq + tile)
    start = tl.load(query_start + seq)
    num_rows = (tl.load(query_start + seq + 1) - start) * group
    computed = tl.load(num_computed + seq)
    row = tl.load(tile_row + tile) + tl.arange(0, rows)
    exists = row < num_rows
    position = computed + row // group
    last = tl.max(tl.where(exists, position, -1), axis=0)
    if part * span > last:
        return
    head = kv_head * group + row % group
    dim = tl.arange(0, wide_dim)
    in_head = dim < head_dim
    where = (start + row // group).to(tl.int64) * query_token_stride + head * query_head_stride
    queries = tl.load(
        query + where[:, None] + dim[None, :], mask=exists[:, None] & in_head[None, :], other=0.0
    )
    scale = tl.load(scales + head, mask=exists, other=0.0)
    window = tl.load(windows + head, mask=exists, other=1)
    slope = tl.load(slopes + head, mask=exists, other=0.0) if has_slopes else scale

    highest = tl.full([rows], _NOTHING, tl.float32)
    total = tl.zeros([rows], tl.float32)
    read = tl.zeros([rows, wide_dim], tl.float32)
    first_seen = tl.min(tl.where(exists, position - window + 1, last), axis=0)
    begin = part * span
    # Whole steps of keys that only a window hides are skipped, unless sink tokens are among them.
    if sink_tokens <= begin:
        begin = tl.maximum(begin, first_seen // keys * keys)
    end = tl.minimum(part * span + span, last + 1)
    for first in range(begin, end, keys):
        key = first + tl.arange(0, keys)
        block = tl.load(
            block_tables + seq * max_blocks + key // block_size, mask=key <= last, other=-1
        ).to(tl.int64)
        there = block >= 0
        at = (
            offset
            + block // blocks_per_page * page_elements
            + block % blocks_per_page * block_elements
            + kv_head * block_size * head_dim
            + key % block_size * head_dim
        )
        held = there[:, None] & in_head[None, :]
        k = tl.load(pool + at[:, None] + dim[None, :], mask=held, other=0.0)
        at += num_kv_heads * block_size * head_dim
        v = tl.load(pool + at[:, None] + dim[None, :], mask=held, other=0.0)
        score = tl.dot(queries, tl.trans(k), input_precision=precision) * scale[:, None]
        if has_softcap:
            bent = tl.exp2(tl.abs(score / softcap) * (-2.0 * _LOG2_E))
            bent = (1.0 - bent) / (1.0 + bent)
            score = softcap * tl.where(score < 0, -bent, bent)
        if has_slopes:
            score += slope[:, None] * key[None, :].to(tl.float32)
        distance = position[:, None] - key[None, :]
        near = (distance < window[:, None]) | (key[None, :] < sink_tokens)
        seen = (distance >= 0) & near & there[None, :] & exists[:, None]
        score = tl.where(seen, score, _NOTHING)
        higher = tl.maximum(highest, tl.max(score, axis=1))
        keep = tl.exp2((highest - higher) * _LOG2_E)
        weight = tl.where(seen, tl.exp2((score - higher[:, None]) * _LOG2_E), 0.0)
        total = total * keep + tl.sum(weight, axis=1)
        read = read * keep[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=precision)
        highest = higher

    number = (tile.to(tl.int64) * num_kv_heads + kv_head) * num_spans + part
    out = number * rows + tl.arange(0, rows)
    tl.store(partial_highest + out, highest, mask=exists)
    tl.store(partial_sum + out, total, mask=exists)
    tl.store(
        partial_read + out[:, None] * wide_dim + dim[None, :],
        read,
        mask=exists[:, None] & in_head[None, :],
    )


@triton.jit
def join_spans(
    output,
    partial_read,
    partial_highest,
    partial_sum,
    query_start,
    num_computed,
    tile_seq,
    tile_row,
    sinks,
    num_heads,
    num_spans,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    wide_dim: tl.constexpr,
    tile_rows: tl.constexpr,
    rows: tl.constexpr,
    parts: tl.constexpr,
    span: tl.constexpr,
    has_sinks: tl.constexpr,
    overlaps: tl.constexpr,
):
    """Outputs `[tokens, heads, head_dim]` of what `attend_spans` left, with the sinks' share.

    One program joins some rows of a tile, so many parts at once.
    """
    await_previous(overlaps)
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    seq = tl.load(tile_seq + tile)
    start = tl.load(query_start + seq)
    num_rows = (tl.load(query_start + seq + 1) - start) * group
    in_tile = tl.program_id(2) * rows + tl.arange(0, rows)
    row = tl.load(tile_row + tile) + in_tile
    exists = row < num_rows
    head = kv_head * group + row % group
    position = tl.load(num_computed + seq) + row // group
    last = tl.max(tl.where(exists, position, -1), axis=0)
    dim = tl.arange(0, wide_dim)
    in_head = dim < head_dim
    if has_sinks:
        highest = tl.load(sinks + head, mask=exists, other=0.0).to(tl.float32)
        total = tl.full([rows], 1.0, tl.float32)
    else:
        highest = tl.full([rows], _NOTHING, tl.float32)
        total = tl.zeros([rows], tl.float32)
    read = tl.zeros([rows, wide_dim], tl.float32)
    number = (tile.to(tl.int64) * num_kv_heads + kv_head) * num_spans
    # Of a row, spans that only others of its tile reach hold nothing, and add nothing.
    for first in range(0, (last + span) // span, parts):
        part = first + tl.arange(0, parts)
        there = (part * span <= last)[:, None] & exists[None, :]
        at = (number + part)[:, None] * tile_rows + in_tile[None, :]
        their_highest = tl.load(partial_highest + at, mask=there, other=_NOTHING)
        higher = tl.maximum(highest, tl.max(their_highest, axis=0))
        keep = tl.exp2((highest - higher) * _LOG2_E)
        add = tl.exp2((their_highest - higher[None, :]) * _LOG2_E)
        sums = tl.load(partial_sum + at, mask=there, other=0.0)
        total = total * keep + tl.sum(sums * add, axis=0)
        theirs = tl.load(
            partial_read + at[:, :, None] * wide_dim + dim[None, None, :],
            mask=there[:, :, None] & in_head[None, None, :],
            other=0.0,
        )
        read = read * keep[:, None] + tl.sum(theirs * add[:, :, None], axis=0)
        highest = higher
    # Who sees nothing reads nothing.
    read = read / tl.where(total == 0.0, 1.0, total)[:, None]
    to = ((start + row // group).to(tl.int64) * num_heads + head) * head_dim
    tl.store(
        output + to[:, None] + dim[None, :],
        read.to(output.dtype.element_ty),
        mask=exists[:, None] & in_head[None, :],
    )
