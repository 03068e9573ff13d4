"""Where the tokens of one step live in the cache: what a kernel has to read, and for whom."""

import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from models.query_tiles import QueryTiles, tile_rows
from models.scoring import Scoring
from models.transfer import send

# In a block table: a block whose tokens nobody needs any more, and that was given back.
RELEASED = -1


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
class BlockTables:
    """The sequences of a step as they are, without padding of queries or copies.

    Attributes:
        block_tables: int32 `[sequences, blocks]`, `RELEASED` where there is none.
        query_start: int32 `[sequences + 1]`, the first row of each sequence in the packed step.
        num_computed: int32 `[sequences]`, tokens that the cache held before.
    """

    block_tables: Tensor
    query_start: Tensor
    num_computed: Tensor


class GroupMetadata:
    """Where the new tokens of one step live in the blocks of one group.

    Kernels differ in what they read; each form is made when it is first asked for.
    """

    def __init__(
        self,
        rows: Sequence["SequenceRow"],
        block_size: int,
        device: torch.device,
        tokens_per_gather: int | None,
    ) -> None:
        self._rows = rows
        self._block_size = block_size
        self._device = device
        self._tokens_per_gather = tokens_per_gather
        self._tiles: dict[tuple[int, int, bool], QueryTiles] = {}

    @cached_property
    def slot_mapping(self) -> Tensor:
        """`[tokens]`, the cache slot of each new token."""
        size = self._block_size
        slots = array("q")
        for table, num_computed, num_new in self._rows:
            for position in range(num_computed, num_computed + num_new):
                slots.append(table[position // size] * size + position % size)
        return send(torch.frombuffer(slots, dtype=torch.int64), self._device)

    @cached_property
    def batches(self) -> tuple[QueryBatch, ...]:
        """All rows of the step, in order, as rectangles."""
        num_decodes = sum(1 for row in self._rows if row.num_new == 1)
        budget = self._tokens_per_gather
        most = None if budget is None else budget // self._block_size
        decodes = _split(self._rows[:num_decodes], most, self._block_size)
        batches: list[QueryBatch] = []
        start = 0
        for members in (*decodes, *([row] for row in self._rows[num_decodes:])):
            batch = _query_batch(members, start, self._block_size, self._device)
            batches.append(batch)
            start = batch.end
        return tuple(batches)

    @cached_property
    def whole_prompts(self) -> tuple[QueryBatch, ...]:
        """The sequences with several tokens, all of which are new, each as a rectangle."""
        ends = itertools.accumulate(row.num_new for row in self._rows)
        return tuple(
            _query_batch([row], end - row.num_new, self._block_size, self._device)
            for row, end in zip(self._rows, ends, strict=True)
            if row.is_whole_prompt
        )

    @cached_property
    def block_tables(self) -> BlockTables:
        """All rows of the step, as they are."""
        width = max(len(row.block_table) for row in self._rows)
        tables, nothing = array("i"), array("i", [RELEASED]) * width
        for table, _, _ in self._rows:
            tables.extend(table)
            tables.extend(nothing[len(table) :])
        ends = itertools.accumulate((row.num_new for row in self._rows), initial=0)
        return BlockTables(
            self._int32(tables).view(-1, width),
            self._int32(array("i", ends)),
            self._int32(array("i", [row.num_computed for row in self._rows])),
        )

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest sequence, the new ones included."""
        return max(row.length for row in self._rows)

    def query_tiles(self, group: int, least_rows: int, *, whole_prompts: bool) -> QueryTiles:
        """Tiles of at least so many rows, where so many query heads share a key/value head.

        Args:
            whole_prompts: theirs too, not only those of other sequences.
        """
        key = group, least_rows, whole_prompts
        if key not in self._tiles:
            included = [
                (index, row.num_new)
                for index, row in enumerate(self._rows)
                if whole_prompts or not row.is_whole_prompt
            ]
            longest = group * max((count for _, count in included), default=1)
            rows = tile_rows(longest, least_rows)
            seq, first_row = array("i"), array("i")
            for index, count in included:
                starts = range(0, count * group, rows)
                seq.extend([index] * len(starts))
                first_row.extend(starts)
            self._tiles[key] = QueryTiles(self._int32(seq), self._int32(first_row), rows)
        return self._tiles[key]

    def _int32(self, numbers: "array[int]") -> Tensor:
        if not numbers:
            return torch.empty(0, dtype=torch.int32, device=self._device)
        return send(torch.frombuffer(numbers, dtype=torch.int32), self._device)


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of one step live in the cache, for each group of heads.

    The packed step holds sequences with exactly one new token first (decodes, neighbours of
    which become a batch), then those with several (prefill chunks, one batch each).
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
        tokens_per_gather: Sequence[int] | None = None,
    ) -> "AttentionMetadata":
        """Describe a step whose sequences are given in packed order, decodes first.

        Args:
            block_tables: for each sequence and group, its blocks, enough for its old and new
                tokens; `RELEASED` stands for blocks that were given back.
            num_computed_tokens: tokens of each sequence that the cache already holds.
            num_new_tokens: tokens of each sequence in this step, 1 or more.
            tokens_per_gather: for each group, the tokens of a batch of decodes, padding
                included, unless it is a single one; None puts all decodes into one batch.
        """
        num_decodes = sum(1 for count in num_new_tokens if count == 1)
        assert all(count == 1 for count in num_new_tokens[:num_decodes]), "decodes come first"
        return AttentionMetadata(
            tuple(
                GroupMetadata(
                    [
                        SequenceRow(table, computed, count)
                        for table, computed, count in zip(
                            tables, num_computed_tokens, num_new_tokens, strict=True
                        )
                    ],
                    block_size,
                    device,
                    None if tokens_per_gather is None else tokens_per_gather[index],
                )
                for index, tables in enumerate(zip(*block_tables, strict=True))
            )
        )


class SequenceRow(NamedTuple):
    """One sequence of a step, in one group.

    Attributes:
        num_computed: tokens that the cache held before.
    """

    block_table: Sequence[int]
    num_computed: int
    num_new: int

    @property
    def length(self) -> int:
        return self.num_computed + self.num_new

    @property
    def is_whole_prompt(self) -> bool:
        return self.num_computed == 0 and self.num_new > 1

    def live(self, block_size: int) -> list[int]:
        """Indices of the blocks that hold something."""
        used = -(-self.length // block_size)
        return [index for index in range(used) if self.block_table[index] != RELEASED]


def _split(
    rows: Sequence[SequenceRow], max_blocks: int | None, block_size: int
) -> Iterator[Sequence[SequenceRow]]:
    """Cut rows into neighbours whose blocks, padded to the longest of them, are few enough."""
    first = width = 0
    for at, row in enumerate(rows):
        wider = max(width, len(row.live(block_size)))
        if max_blocks is not None and at > first and wider * (at + 1 - first) > max_blocks:
            yield rows[first:at]
            first, wider = at, len(row.live(block_size))
        width = wider
    if rows:
        yield rows[first:]


def _query_batch(
    rows: Sequence[SequenceRow], start: int, block_size: int, device: torch.device
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
    first = send(torch.tensor(starts, dtype=torch.int64), device)
    offsets = torch.arange(block_size, device=device)
    positions = (first[:, :, None] + offsets).flatten(1)
    lengths = send(torch.tensor([row.length for row in rows]), device)[:, None]
    computed = send(torch.tensor([row.num_computed for row in rows]), device)[:, None]
    num_new = rows[0].num_new
    alone = len(rows) == 1 and rows[0].num_computed == 0
    return QueryBatch(
        start=start,
        end=start + len(rows) * num_new,
        block_tables=send(torch.tensor(tables, dtype=torch.int64), device),
        query_positions=computed + torch.arange(num_new, device=device),
        key_positions=positions.masked_fill(positions >= lengths, -1),
        whole_length=rows[0].length if alone else None,
    )
