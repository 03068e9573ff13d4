"""Paged storage of keys and values: tensors only. Who owns which block is decided elsewhere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.config import ModelConfig
from models.kv_layout import KVLayout, LayerPart
from models.scoring import Scoring

# In a block table: a block whose tokens nobody needs any more, and that was given back.
RELEASED = -1


@dataclass(frozen=True, slots=True)
class CachePart:
    """Keys and values of some heads of one layer, somewhere in each block of their group.

    Within a block they lie as `[2, kv_heads, block_size, head_dim]`, keys before values. Heads
    come before positions, so that one row copy per block and head gathers a sequence in the order
    in which attention reads it.

    Attributes:
        pool: the memory of all layers, one dimension.
    """

    pool: Tensor
    part: LayerPart
    block_size: int
    block_elements: int
    blocks_per_page: int
    page_elements: int

    def write(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store `[tokens, kv_heads, head_dim]` at slots `block * block_size + offset`."""
        both = torch.stack((key, value), dim=1)
        width = self._row_width(self.part.head_dim)
        self.pool.view(-1, width).index_copy_(
            0, self._token_rows(slot_mapping, width), both.reshape(-1, width)
        )

    def clear(self, slots: Tensor) -> None:
        """Make `[tokens]` slots finite again."""
        width = self._row_width(self.part.head_dim)
        self.pool.view(-1, width)[self._token_rows(slots, width)] = 0

    def gather(self, block_tables: Tensor) -> tuple[Tensor, Tensor]:
        """Read whole blocks.

        Args:
            block_tables: `[batch, blocks]` block numbers.

        Returns:
            Keys and values, each `[batch, kv_heads, blocks * block_size, head_dim]`.
        """
        head_dim, num_heads = self.part.head_dim, len(self.part.kv_heads)
        head_elements = self.block_size * head_dim
        width = self._row_width(head_elements)
        device = block_tables.device
        starts = self._block_starts(block_tables)[None, :, None, :]
        heads = torch.arange(2 * num_heads, device=device) * head_elements
        first = starts + heads.view(2, 1, num_heads, 1)
        rows = self._rows(first, head_elements, width)
        shape = (2, block_tables.shape[0], num_heads, -1, head_dim)
        # index_select copies rows; plain indexing copies elements and is 20 times slower.
        key, value = self.pool.view(-1, width).index_select(0, rows).view(shape)
        return key, value

    def _block_starts(self, blocks: Tensor) -> Tensor:
        """Element of the pool at which this part of each block begins."""
        page, within = blocks // self.blocks_per_page, blocks % self.blocks_per_page
        return page * self.page_elements + within * self.block_elements + self.part.offset

    def _token_rows(self, slots: Tensor, width: int) -> Tensor:
        """Rows of `[tokens, 2, kv_heads]` keys and values."""
        head_dim = self.part.head_dim
        starts = self._block_starts(slots // self.block_size) + slots % self.block_size * head_dim
        heads = torch.arange(2 * len(self.part.kv_heads), device=slots.device)
        return self._rows(starts[:, None] + heads * (self.block_size * head_dim), head_dim, width)

    def _row_width(self, elements: int) -> int:
        """The longest row, dividing `elements`, on whose multiples everything begins.

        All of `elements` unless the layers have head widths that do not divide each other.
        """
        return math.gcd(elements, self.part.offset, self.block_elements, self.page_elements)

    @staticmethod
    def _rows(starts: Tensor, elements: int, width: int) -> Tensor:
        if width == elements:
            return (starts // width).flatten()
        steps = torch.arange(elements // width, device=starts.device)
        return ((starts // width)[..., None] + steps).flatten()


class KVCache:
    """One pool of pages for all layers, cut as `KVLayout` says.

    Memory starts as zeros, because masked positions are multiplied by 0 and must be finite.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.layout = KVLayout.of(config, block_size)
        page_elements = self.layout.page_elements
        self.pool = torch.zeros(num_pages * page_elements, dtype=dtype, device=device)
        self.layers = tuple(
            tuple(self._cache_part(part, page_elements) for part in parts)
            for parts in self.layout.parts
        )

    @property
    def block_size(self) -> int:
        return self.layout.block_size

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes

    def _cache_part(self, part: LayerPart, page_elements: int) -> CachePart:
        group = self.layout.groups[part.group]
        return CachePart(
            self.pool,
            part,
            self.block_size,
            group.block_elements,
            group.blocks_per_page,
            page_elements,
        )


@dataclass(frozen=True, slots=True)
class QueryBatch:
    """Sequences with equally many new tokens: rows `start:end` of the packed step.

    Attributes:
        block_tables: `[sequences, blocks]`, only blocks that are still there, padded with a block
            of the same sequence, so that nothing of another sequence is ever read, not even
            under a mask.
        query_positions: int64 `[sequences, queries]`.
        key_positions: int64 `[sequences, blocks * block_size]`, -1 where there is no key.
        whole_length: if this is one sequence whose tokens are all new, how many; else None.
    """

    start: int
    end: int
    block_tables: Tensor
    query_positions: Tensor
    key_positions: Tensor
    whole_length: int | None
    _masks: dict[object, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def unpack(self, packed: Tensor) -> Tensor:
        """`[tokens, heads, width]` of the step to `[sequences, heads, queries, width]`."""
        rows = packed[self.start : self.end]
        return rows.unflatten(0, self.query_positions.shape).transpose(1, 2)

    def mask(self, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
        """`visible` and `bias` of a scoring; computed once for all layers that agree on them."""
        key = (
            scoring.causal,
            scoring.window,
            scoring.sink_tokens,
            scoring.alibi,
            scoring.scale if scoring.alibi is not None else None,
        )
        if key not in self._masks:
            visible = scoring.visible(self.query_positions, self.key_positions)
            self._masks[key] = visible, scoring.bias(self.key_positions)
        return self._masks[key]


@dataclass(frozen=True, slots=True)
class GroupMetadata:
    """Where the new tokens of one step live in the blocks of one group.

    Attributes:
        slot_mapping: `[tokens]`, the cache slot of each new token.
        batches: all rows of the step, in order.
    """

    slot_mapping: Tensor
    batches: tuple[QueryBatch, ...]


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of one step live in the cache, for each group of heads.

    The packed step holds sequences with exactly one new token first (decodes, which become one
    batch), then those with several (prefill chunks, one batch each).
    """

    groups: tuple[GroupMetadata, ...]

    @staticmethod
    def build(
        *,
        block_tables: Sequence[Sequence[Sequence[int]]],
        num_computed_tokens: Sequence[int],
        num_new_tokens: Sequence[int],
        block_size: int,
        device: torch.device,
    ) -> "AttentionMetadata":
        """Describe a step whose sequences are given in packed order, decodes first.

        Args:
            block_tables: for each sequence and group, its blocks, enough for its old and new
                tokens; `RELEASED` stands for blocks that were given back.
            num_computed_tokens: tokens of each sequence that the cache already holds.
            num_new_tokens: tokens of each sequence in this step, 1 or more.
        """
        num_decodes = sum(1 for count in num_new_tokens if count == 1)
        assert all(count == 1 for count in num_new_tokens[:num_decodes]), "decodes come first"
        groups: list[GroupMetadata] = []
        for tables in zip(*block_tables, strict=True):
            rows = [
                _Row(table, computed, count)
                for table, computed, count in zip(
                    tables, num_computed_tokens, num_new_tokens, strict=True
                )
            ]
            slots = [slot for row in rows for slot in row.slots(block_size)]
            batches: list[QueryBatch] = []
            start = 0
            alike = [rows[:num_decodes]] if num_decodes else []
            for members in (*alike, *([row] for row in rows[num_decodes:])):
                batch = _query_batch(members, start, block_size, device)
                batches.append(batch)
                start = batch.end
            slot_mapping = torch.tensor(slots, dtype=torch.int64, device=device)
            groups.append(GroupMetadata(slot_mapping, tuple(batches)))
        return AttentionMetadata(tuple(groups))


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence of a step, in one group."""

    block_table: Sequence[int]
    num_computed: int
    num_new: int

    @property
    def length(self) -> int:
        return self.num_computed + self.num_new

    def slots(self, block_size: int) -> list[int]:
        return [
            self.block_table[position // block_size] * block_size + position % block_size
            for position in range(self.num_computed, self.length)
        ]

    def live(self, block_size: int) -> list[int]:
        """Indices of the blocks that hold something."""
        used = -(-self.length // block_size)
        return [index for index in range(used) if self.block_table[index] != RELEASED]


def _query_batch(
    rows: Sequence[_Row], start: int, block_size: int, device: torch.device
) -> QueryBatch:
    live = [row.live(block_size) for row in rows]
    width = max(len(indices) for indices in live)
    tables: list[list[int]] = []
    starts: list[list[int]] = []
    for row, indices in zip(rows, live, strict=True):
        padding = width - len(indices)
        blocks = [row.block_table[index] for index in indices]
        tables.append(blocks + blocks[-1:] * padding)
        # Blocks that only pad start behind the end, where all positions are turned into -1.
        starts.append([index * block_size for index in indices] + [row.length] * padding)
    first = torch.tensor(starts, dtype=torch.int64, device=device)
    offsets = torch.arange(block_size, device=device)
    positions = (first[:, :, None] + offsets).flatten(1)
    lengths = torch.tensor([row.length for row in rows], device=device)[:, None]
    computed = torch.tensor([row.num_computed for row in rows], device=device)[:, None]
    num_new = rows[0].num_new
    alone = len(rows) == 1 and rows[0].num_computed == 0
    return QueryBatch(
        start=start,
        end=start + len(rows) * num_new,
        block_tables=torch.tensor(tables, dtype=torch.int64, device=device),
        query_positions=computed + torch.arange(num_new, device=device),
        key_positions=positions.masked_fill(positions >= lengths, -1),
        whole_length=rows[0].length if alone else None,
    )
