"""The KV blocks of heads that remember the same stretch of the past: integers only."""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from service.engine.sequence import RELEASED


@dataclass(frozen=True, slots=True)
class BlockGroup:
    """What the heads of a group remember, and how many of their blocks a page holds.

    Attributes:
        window: the newest so many tokens; None is all.
        sink_tokens: the first so many tokens in any case.
    """

    window: int | None = None
    sink_tokens: int = 0
    blocks_per_page: int = 1

    def blocks_at_once(self, block_size: int, num_tokens: int, max_new_tokens: int) -> int:
        """Most blocks that a sequence holds at one time while it grows to so many tokens.

        Args:
            max_new_tokens: tokens of one step.
        """
        every = -(-num_tokens // block_size)
        if self.window is None:
            return every
        # The window and the new tokens in a row, the first of them the last of its block.
        in_a_row = self.window - 1 + max_new_tokens
        recent = -(-(in_a_row - 1) // block_size) + 1
        return min(every, recent + -(-self.sink_tokens // block_size))

    def needed(self, block_size: int, length: int) -> tuple[range, range]:
        """Which of the first `length` blocks are needed after them: those of the window, and
        before it those of the sink tokens."""
        if self.window is None:
            return range(length), range(0)
        first = max(length * block_size - self.window + 1, 0) // block_size
        return range(first, length), range(min(-(-self.sink_tokens // block_size), first))


def pages_for(
    groups: Iterable[BlockGroup], block_size: int, num_tokens: int, max_new_tokens: int
) -> int:
    """Pages that one sequence takes at most while it grows to so many tokens."""
    return sum(
        -(-group.blocks_at_once(block_size, num_tokens, max_new_tokens) // group.blocks_per_page)
        for group in groups
    )


class GroupPool:
    """The blocks of one group, on the pages that it owns.

    Attributes:
        references: sequences that use a block, where any do.
        spare: blocks that nobody uses on pages with used blocks; empty ones first.
    """

    def __init__(self, group: BlockGroup, num_pages: int) -> None:
        self.group = group
        self.references: dict[int, int] = {}
        self.spare: OrderedDict[int, None] = OrderedDict()
        self.block_of_hash: dict[bytes, int] = {}
        self.hash_of_block: dict[int, bytes] = {}

    @property
    def num_empty(self) -> int:
        """Spare blocks without content that can be found again."""
        return sum(block not in self.hash_of_block for block in self.spare)

    def page_of(self, block: int) -> int:
        return block // self.group.blocks_per_page

    def blocks_of(self, page: int) -> range:
        size = self.group.blocks_per_page
        return range(page * size, (page + 1) * size)

    def add_page(self, page: int) -> None:
        """Make the blocks of a page spare: it is in use now."""
        for block in self.blocks_of(page):
            self.add_spare(block)

    def holds_cached(self, page: int) -> bool:
        return any(block in self.hash_of_block for block in self.blocks_of(page))

    def drop_page(self, page: int) -> None:
        """Forget what the blocks of a page hold: it gets another owner."""
        for block in self.blocks_of(page):
            self._forget(block)

    def add_spare(self, block: int) -> None:
        self.spare[block] = None
        if block not in self.hash_of_block:
            self.spare.move_to_end(block, last=False)

    def take_spare(self, *, cached: bool) -> int | None:
        """The spare block to be overwritten first; None if there is none but cached ones."""
        block = next(iter(self.spare), None)
        if block is None or (not cached and block in self.hash_of_block):
            return None
        del self.spare[block]
        self._forget(block)
        return block

    def num_known(self, hashes: Sequence[bytes]) -> int:
        """How many of the first digests belong to blocks that can be found again."""
        unknown = (at for at, digest in enumerate(hashes) if digest not in self.block_of_hash)
        return next(unknown, len(hashes))

    def knows(self, hashes: Sequence[bytes], needed: tuple[range, range]) -> bool:
        """Whether blocks can be found again; asks for the newest first, which are missing most."""
        return all(hashes[at] in self.block_of_hash for part in needed for at in reversed(part))

    def find(self, hashes: Sequence[bytes], needed: tuple[range, range]) -> list[int]:
        """Known blocks where they are needed, `RELEASED` elsewhere."""
        blocks = [RELEASED] * len(hashes)
        for at in itertools.chain(*needed):
            blocks[at] = self.block_of_hash[hashes[at]]
        return blocks

    def remember(self, block: int, digest: bytes) -> None:
        if block not in self.hash_of_block and digest not in self.block_of_hash:
            self.hash_of_block[block] = digest
            self.block_of_hash[digest] = block

    def check_integrity(self, counted: dict[int, int]) -> None:
        assert self.references == counted, f"references {self.references}, tables {counted}"
        assert not self.spare.keys() & self.references.keys(), "a block spare and used"
        used_pages = {self.page_of(block) for block in self.references}
        unused = {b for page in used_pages for b in self.blocks_of(page)} - self.references.keys()
        assert self.spare.keys() == unused, "spare blocks are those beside used ones"
        known = [block in self.hash_of_block for block in self.spare]
        assert known == sorted(known), "empty spare blocks come first"
        assert {digest: block for block, digest in self.hash_of_block.items()} == (
            self.block_of_hash
        ), "the two directions of the prefix cache differ"

    def _forget(self, block: int) -> None:
        digest = self.hash_of_block.pop(block, None)
        if digest is not None:
            del self.block_of_hash[digest]
