"""Sequences of a step as rectangles, for kernels that gather keys and values first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

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


def split_rows(
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


def query_batch(
    rows: Sequence[SequenceRow], start: int, block_size: int, device: torch.device
) -> QueryBatch:
    """Rows with equally many new tokens, which begin at a row of the packed step."""
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
