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


class CachePart:
    """Keys and values of some heads of one layer, somewhere in each block of their group.

    Within a block they lie as `[2, kv_heads, block_size, head_dim]`, keys before values. Heads
    come before positions, so that one row copy per block and head gathers a sequence in the order
    in which attention reads it.

    Args:
        pool: the memory of all layers, one dimension.
        part: which heads, and where in a block.
        layout: how the pool is cut.
    """

    def __init__(self, pool: Tensor, part: LayerPart, layout: KVLayout) -> None:
        self.pool = pool
        self.part = part
        self.block_size = layout.block_size
        self._block_rows = _Rows(pool, part, layout, layout.block_size * part.head_dim)
        self._token_rows = _Rows(pool, part, layout, part.head_dim)

    def write(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store `[tokens, kv_heads, head_dim]` at slots `block * block_size + offset`."""
        rows = self._slot_rows(slot_mapping)
        both = torch.stack((key, value), dim=1)
        self._token_rows.memory.index_copy_(0, rows, both.view(-1, self._token_rows.width))

    def clear(self, slots: Tensor) -> None:
        """Make `[tokens]` slots finite again."""
        self._token_rows.memory[self._slot_rows(slots)] = 0

    def gather(self, block_tables: Tensor) -> tuple[Tensor, Tensor]:
        """Read whole blocks.

        Args:
            block_tables: `[batch, blocks]` block numbers.

        Returns:
            Keys and values, each `[batch, kv_heads, blocks * block_size, head_dim]`.
        """
        rows = self._block_rows.first(block_tables)[None, :, None, :, None]
        num_heads = len(self.part.kv_heads)
        rows = rows + self._block_rows.of_heads.view(2, 1, num_heads, 1, -1)
        # index_select copies rows; plain indexing copies elements and is 20 times slower.
        read = self._block_rows.memory.index_select(0, rows.flatten())
        key, value = read.view(2, block_tables.shape[0], num_heads, -1, self.part.head_dim)
        return key, value

    def _slot_rows(self, slots: Tensor) -> Tensor:
        """Rows of the keys and values of `[tokens]` slots, token by token."""
        rows = self._token_rows
        first = rows.first(slots // self.block_size) + slots % self.block_size * rows.per_item
        return (first[:, None] + rows.of_heads).flatten()


class _Rows:
    """The pool as a matrix whose rows are, or add up to, what is copied at once.

    A row is the whole of it unless layers have head widths that do not divide each other.

    Attributes:
        width: elements of a row.
        per_item: rows that are copied at once.
        of_heads: rows, from the start of a block, of each head's keys, then of each head's values.
    """

    def __init__(self, pool: Tensor, part: LayerPart, layout: KVLayout, elements: int) -> None:
        group = layout.groups[part.group]
        starts = (part.offset, group.block_elements, layout.page_elements)
        self.width = math.gcd(elements, *starts)
        self.per_item = elements // self.width
        self.memory = pool.view(-1, self.width)
        self._page, self._block = layout.page_elements // self.width, starts[1] // self.width
        self._blocks_per_page = group.blocks_per_page
        head_elements = layout.block_size * part.head_dim
        heads = torch.arange(2 * len(part.kv_heads), device=pool.device)
        first = (part.offset + heads * head_elements) // self.width
        steps = torch.arange(self.per_item, device=pool.device)
        self.of_heads = (first[:, None] + steps).flatten()

    def first(self, blocks: Tensor) -> Tensor:
        """The row at which each block begins."""
        if self._blocks_per_page == 1:
            return blocks * self._page
        within = blocks % self._blocks_per_page
        return blocks // self._blocks_per_page * self._page + within * self._block


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
        self.pool = torch.zeros(num_pages * self.layout.page_elements, dtype=dtype, device=device)
        self.layers = tuple(
            tuple(CachePart(self.pool, part, self.layout) for part in parts)
            for parts in self.layout.parts
        )

    @property
    def block_size(self) -> int:
        return self.layout.block_size

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes


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
        return rows.unflatten(0, self.query_positions.shape).transpose(1, 2)  # type: ignore[no-any-return]

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
