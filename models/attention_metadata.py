"""Where the tokens of one step live in the cache: what a kernel has to read, and for whom."""

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from models.query_batch import RELEASED, QueryBatch, SequenceRow, query_batch, split_rows
from models.query_tiles import QueryTiles, tile_rows
from models.transfer import send

# Forms that a step of the same decodes makes anew.
_FORMS_OF_ONE_STEP = ("batches", "max_length")


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
        rows: Sequence[SequenceRow],
        block_size: int,
        device: torch.device,
        tokens_per_gather: int | None,
    ) -> None:
        self._first_rows = rows
        self._num_advanced = 0
        self._block_size = block_size
        self._device = device
        self._tokens_per_gather = tokens_per_gather
        self._tiles: dict[tuple[int, int, bool], QueryTiles] = {}
        # What forms lie in that have been made.
        self._slots, self._computed, self._tables = array("q"), array("i"), array("i")
        self._width = 0

    def advance(self, changed: Sequence[int]) -> None:
        """Go on to the next step, if this one was of decodes and that is of the same, on a CPU.

        Forms stay where they are, one token later, or are made again when they are asked for.

        Args:
            changed: sequences whose block tables are not what they were.
        """
        assert not self._slots or len(self._slots) == len(self._first_rows), "only decodes go on"
        self._num_advanced += 1
        made, size = vars(self), self._block_size
        for form in _FORMS_OF_ONE_STEP:
            made.pop(form, None)
        count_up(self._slots)
        count_up(self._computed)
        for index in changed:
            table, num_computed, _ = self._first_rows[index]
            if self._slots:
                position = num_computed + self._num_advanced
                self._slots[index] = table[position // size] * size + position % size
            if len(table) <= self._width:
                first = index * self._width
                self._tables[first : first + len(table)] = array("i", table)
            else:
                made.pop("block_tables", None)

    @property
    def _rows(self) -> Sequence[SequenceRow]:
        ahead = self._num_advanced
        if not ahead:
            return self._first_rows
        return [SequenceRow(table, at + ahead, new) for table, at, new in self._first_rows]

    @cached_property
    def slot_mapping(self) -> Tensor:
        """`[tokens]`, the cache slot of each new token."""
        size = self._block_size
        slots = self._slots = array("q")
        for table, num_computed, num_new in self._rows:
            for position in range(num_computed, num_computed + num_new):
                slots.append(table[position // size] * size + position % size)
        return send(torch.frombuffer(slots, dtype=torch.int64), self._device)

    @cached_property
    def batches(self) -> tuple[QueryBatch, ...]:
        """All rows of the step, in order, as rectangles."""
        rows = self._rows
        num_decodes = sum(1 for row in rows if row.num_new == 1)
        budget = self._tokens_per_gather
        most = None if budget is None else budget // self._block_size
        decodes = split_rows(rows[:num_decodes], most, self._block_size)
        batches: list[QueryBatch] = []
        start = 0
        for members in (*decodes, *([row] for row in rows[num_decodes:])):
            batch = query_batch(members, start, self._block_size, self._device)
            batches.append(batch)
            start = batch.end
        return tuple(batches)

    @cached_property
    def whole_prompts(self) -> tuple[QueryBatch, ...]:
        """The sequences with several tokens, all of which are new, each as a rectangle."""
        ends = itertools.accumulate(row.num_new for row in self._rows)
        return tuple(
            query_batch([row], end - row.num_new, self._block_size, self._device)
            for row, end in zip(self._rows, ends, strict=True)
            if row.is_whole_prompt
        )

    @cached_property
    def block_tables(self) -> BlockTables:
        """All rows of the step, as they are."""
        width = self._width = max(len(row.block_table) for row in self._rows)
        tables, nothing = array("i"), array("i", [RELEASED]) * width
        for table, _, _ in self._rows:
            tables.extend(table)
            tables.extend(nothing[len(table) :])
        ends = itertools.accumulate((row.num_new for row in self._rows), initial=0)
        computed = array("i", [row.num_computed for row in self._rows])
        self._tables, self._computed = tables, computed
        return BlockTables(
            self._int32(tables).view(-1, width),
            self._int32(array("i", ends)),
            self._int32(computed),
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


def count_up(numbers: "array[int]") -> None:
    """Make each one higher, where it lies."""
    numbers[:] = array(numbers.typecode, [number + 1 for number in numbers])


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of one step live in the cache, for each group of heads.

    The packed step holds sequences with exactly one new token first (decodes, neighbours of
    which become a batch), then those with several (prefill chunks, one batch each).
    """

    groups: tuple[GroupMetadata, ...]

    def advance(self, changed: Sequence[int]) -> None:
        """`GroupMetadata.advance` of all."""
        for group in self.groups:
            group.advance(changed)

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
