"""Attention in Triton (`models/gpu/attention.py`), which reads the cache where it lies; whole
prompts by torch's own, which reads each key once for many queries."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from models.attention_metadata import GroupMetadata
from models.config import MAX_WINDOW, HeadConfig
from models.gpu.availability import why_unavailable
from models.kernels.dense import attend
from models.kv_cache import CachePart
from models.query_tiles import QueryTiles, tile_rows
from models.scoring import Scoring

_MAX_HEAD_DIM = 256
# Of a matrix product in Triton.
_LEAST_ROWS = 16
_LEAST_DIM = 16
# Keys of one span: longer ones leave a GPU idle where sequences are few, shorter ones leave more to
# be joined.
SPAN = 256
# Most keys at once and warps, by the bytes of a number; measured on an H200. In float32, whose
# products no matrix unit computes, as many keys would take half a minute to be compiled.
_LAUNCHES = {2: (64, 2), 4: (32, 4)}
_STAGES = 3
# Of as many keys, and of as many values: with those of all stages, what the shared memory holds.
_KEY_BYTES = 2**14
# What spans leave to be joined, at most, before the next tiles follow.
_PARTIAL_BYTES = 2**28
# Numbers that one program joins at once: what the registers of four warps hold with ease.
_JOINED = 4096


def why_unsupported(heads: HeadConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why it cannot compute these heads; None if it can."""
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return f"the device is {device.type}"
        if dtype == torch.bfloat16:
            return "Triton's interpreter multiplies the bits of bfloat16"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the type is {dtype}".replace("torch.", "")
    if heads.head_dim > _MAX_HEAD_DIM:
        return f"head_dim is {heads.head_dim}"
    if not heads.causal:
        return "the heads are not causal"
    if heads.alibi is not None and heads.alibi.bfloat16:
        return "the position bias is rounded to bfloat16"
    return why_unavailable(device)


def partial_bytes(heads: HeadConfig, batch: int, length: int) -> int:
    """Bytes of what the spans of a step of decodes leave to be joined, at once."""
    group = heads.num_heads // heads.num_kv_heads
    rows = tile_rows(group, _LEAST_ROWS)
    tile = _tile_bytes(heads.num_kv_heads, length, rows, heads.head_dim)
    return min(batch * -(-group // rows), _tiles_at_once(tile)) * tile


def _tile_bytes(num_kv_heads: int, length: int, rows: int, head_dim: int) -> int:
    """The same of one tile of queries."""
    return 4 * num_kv_heads * -(-length // SPAN) * rows * (_wide(head_dim) + 2)


def _tiles_at_once(tile_bytes: int) -> int:
    """A multiple of 4, so that those of every launch begin at an address of the same kind."""
    return max(_PARTIAL_BYTES // tile_bytes // 4 * 4, 4)


def _wide(head_dim: int) -> int:
    """What a tile of Triton has in place of `head_dim`: a power of two."""
    return max(_LEAST_DIM, 1 << (head_dim - 1).bit_length())


def paged_attention(
    query: Tensor, cache: CachePart, metadata: GroupMetadata, scoring: Scoring
) -> Tensor:
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    whole = metadata.whole_prompts if _is_plain(scoring, metadata.max_length) else ()
    for prompt in whole:  # torch's own is the fastest for them, once keys lie side by side
        key, value = (
            part[:, :, : prompt.whole_length] for part in cache.gather(prompt.block_tables)
        )
        read = attend(prompt.unpack(query), key, value, scoring, is_causal=True)
        output[prompt.start : prompt.end] = read.transpose(1, 2).flatten(0, 1)
    tiles = metadata.query_tiles(
        query.shape[1] // len(cache.part.kv_heads), _LEAST_ROWS, whole_prompts=not whole
    )
    tile = _tile_bytes(len(cache.part.kv_heads), metadata.max_length, tiles.rows, query.shape[-1])
    for some in tiles.split(_tiles_at_once(tile)):
        _attend_tiles(output, query, cache, metadata, some, scoring)
    return output


def _is_plain(scoring: Scoring, length: int) -> bool:
    """Whether torch's fused attention can say it."""
    return scoring.is_plain(length) and scoring.softcap is None and scoring.sinks is None


def _attend_tiles(
    output: Tensor,
    query: Tensor,
    cache: CachePart,
    metadata: GroupMetadata,
    tiles: QueryTiles,
    scoring: Scoring,
) -> None:
    # Nothing but a GPU's own process needs Triton, and importing it takes a second.
    from triton import next_power_of_2

    from models.gpu.attention import attend_spans, join_spans
    from models.gpu.launch import launch_options

    options = launch_options(query.device)
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = len(cache.part.kv_heads)
    group = num_heads // num_kv_heads
    tables = metadata.block_tables
    itemsize = query.dtype.itemsize
    most_keys, num_warps = _LAUNCHES[itemsize]
    num_spans = -(-metadata.max_length // SPAN)
    rows, wide_dim = tiles.rows, _wide(head_dim)
    shape = (len(tiles.seq), num_kv_heads, num_spans, rows)
    partial_read = query.new_empty((*shape, wide_dim), dtype=torch.float32)
    partial_highest, partial_sum = query.new_empty((2, *shape), dtype=torch.float32)
    heads = scoring.numbers(num_heads).on(query.device)
    offset, page_elements, block_elements, blocks_per_page, _, block_size = cache.places
    attend_spans[shape[:3]](
        query,
        cache.pool,
        tables.block_tables,
        tables.query_start,
        tables.num_computed,
        tiles.seq,
        tiles.first_row,
        *heads,
        partial_read,
        partial_highest,
        partial_sum,
        query.stride(0),
        query.stride(1),
        tables.block_tables.shape[1],
        offset,
        page_elements,
        block_elements,
        blocks_per_page,
        min(scoring.sink_tokens, MAX_WINDOW),
        scoring.softcap or 1.0,
        num_spans,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        wide_dim=wide_dim,
        rows=rows,
        keys=min(most_keys, _KEY_BYTES // (wide_dim * itemsize)),
        span=SPAN,
        has_softcap=scoring.softcap is not None,
        has_slopes=scoring.alibi is not None,
        precision="ieee",
        num_warps=num_warps,
        num_stages=_STAGES,
        **options,
    )
    parts = min(next_power_of_2(num_spans), max(1, _JOINED // wide_dim))
    joined_rows = max(1, min(rows, _JOINED // (parts * wide_dim)))
    join_spans[(*shape[:2], rows // joined_rows)](
        output,
        partial_read,
        partial_highest,
        partial_sum,
        tables.query_start,
        tables.num_computed,
        tiles.seq,
        tiles.first_row,
        heads[0] if scoring.sinks is None else scoring.sinks,
        num_heads,
        num_spans,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        wide_dim=wide_dim,
        tile_rows=rows,
        rows=joined_rows,
        parts=parts,
        span=SPAN,
        has_sinks=scoring.sinks is not None,
        **options,
    )


def rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    pool: Tensor,
    slots: Tensor,
    places: Sequence[int],
    *,
    interleaved: bool,
) -> None:
    """`models.cpu.fused.rotate_and_store` on a GPU: one launch for all of it."""
    from triton import next_power_of_2

    from models.gpu.launch import launch_options
    from models.gpu.rotation import rotate_and_store as kernel

    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    cos, sin = rotation or (query, query)  # not read
    half = 0 if rotation is None else cos.shape[-1]
    offset, page_elements, block_elements, blocks_per_page, _, block_size = places
    kernel[num_tokens, num_heads + 2 * num_kv_heads](
        query,
        key,
        value,
        cos,
        sin,
        pool,
        slots,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        offset,
        page_elements,
        block_elements,
        blocks_per_page,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        half=half,
        block_size=block_size,
        wide_half=max(1, next_power_of_2(half)),
        wide_dim=next_power_of_2(head_dim),
        interleaved=interleaved,
        **launch_options(query.device),
    )
