"""Attention by our own operation in C++ (`models/cpu/paged_attention.cpp`), which reads the cache
where it lies."""

import torch
from torch import Tensor

from models.attention_metadata import GroupMetadata
from models.config import MAX_WINDOW, HeadConfig
from models.cpu.library import why_unavailable
from models.kv_cache import CachePart
from models.scoring import Scoring

_MAX_HEAD_DIM = 256


def why_unsupported(heads: HeadConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why it cannot compute these heads; None if it can."""
    if device.type != "cpu":
        return f"the device is {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the type is {dtype}".replace("torch.", "")
    if heads.head_dim > _MAX_HEAD_DIM or (dtype == torch.bfloat16 and heads.head_dim % 2):
        return f"head_dim is {heads.head_dim}"
    if not heads.causal:
        return "the heads are not causal"
    if heads.alibi is not None and heads.alibi.bfloat16:
        return "the position bias is rounded to bfloat16"
    return why_unavailable()


def paged_attention(
    query: Tensor, cache: CachePart, metadata: GroupMetadata, scoring: Scoring
) -> Tensor:
    numbers = scoring.numbers(query.shape[1])
    tables = metadata.block_tables
    return torch.ops.headroom.paged_attention(  # type: ignore[no-any-return]
        query,
        cache.pool,
        tables.block_tables,
        tables.query_start,
        tables.num_computed,
        cache.places,
        numbers.scales,
        numbers.windows,
        numbers.slopes,
        [] if scoring.sinks is None else scoring.sinks.tolist(),
        min(scoring.sink_tokens, MAX_WINDOW),
        scoring.softcap or 0.0,
    )
