"""Which KV block belongs to whom: integers only, no tensors.

Heads that must remember the same stretch of the past form a group with blocks of its own (see
`models.kv_layout`). The pool hands out *pages*; a page belongs to one group at a time, which cuts
it into its blocks. With one group a page is a block.

A block is *used* (referenced by one or more sequences) or not; a page without used blocks is
*free*. A block that is not used may still hold the keys and values of a known token prefix; then
it is *cached*, and the last to be reused.
"""

import bisect
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from service.engine.group_pool import BlockGroup, GroupPool, pages_for
from service.engine.sequence import RELEASED, Sequence


class BlockManager:
    """A pool of equal pages.

    Args:
        num_pages: size of the pool.
        block_size: tokens per block.
        enable_prefix_caching: find blocks again by the tokens they were computed from.
        groups: the groups of heads; by default one that remembers everything.
    """

    def __init__(
        self,
        num_pages: int,
        block_size: int,
        *,
        enable_prefix_caching: bool,
        groups: tuple[BlockGroup, ...] = (BlockGroup(),),
    ) -> None:
        self.num_pages = num_pages
        self.block_size = block_size
        self.groups = groups
        self._caching = enable_prefix_caching
        # Taken from the front; pages without cached blocks go there, the others to the back.
        self._free_pages: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._cached_pages: set[int] = set()
        self._owner: list[int | None] = [None] * num_pages
        self._pools = [GroupPool(group, num_pages) for group in groups]
        self._windows = [
            (index, group.window, group.sink_tokens)
            for index, group in enumerate(groups)
            if group.window is not None
        ]
        # How many tokens into a block a decode is when it may need one, or give one back.
        self._turns = {0, *((window - 1) % block_size for _, window, _ in self._windows)}

    @property
    def num_free_pages(self) -> int:
        """Pages that can be handed out, those with cached blocks included."""
        return len(self._free_pages)

    @property
    def num_used_pages(self) -> int:
        return self.num_pages - len(self._free_pages)

    @property
    def num_cached_pages(self) -> int:
        """Free pages with content that can be found again."""
        return len(self._cached_pages)

    def pages_for(self, num_tokens: int, max_new_tokens: int) -> int:
        """Pages that one sequence takes at most while it grows to so many tokens.

        Args:
            max_new_tokens: tokens of one step.
        """
        return pages_for(self.groups, self.block_size, num_tokens, max_new_tokens)

    def max_tokens(self, at_most: int, max_new_tokens: int) -> int:
        """The longest sequence, up to `at_most`, that the whole pool holds."""
        lengths = range(1, at_most + 1)
        return bisect.bisect_right(
            lengths, self.num_pages, key=lambda length: self.pages_for(length, max_new_tokens)
        )

    def outstanding(self, running: Iterable[Sequence], max_new_tokens: int) -> list[int]:
        """Blocks of each group that running sequences may still take while they compute the
        tokens they have, and one for each that goes on.

        Args:
            max_new_tokens: tokens of one step.
        """
        blocks = [0] * len(self.groups)
        for seq in running:
            for index, group in enumerate(self.groups):
                table = seq.block_tables[index]
                most = group.blocks_at_once(self.block_size, seq.num_tokens, max_new_tokens)
                blocks[index] += max(1, most - (len(table) - table.count(RELEASED)))
        return blocks

    def admit(
        self,
        seq: Sequence,
        *,
        first_step: int,
        max_new_tokens: int,
        reserve: SequenceOf[int],
    ) -> bool:
        """Give a sequence without blocks those for all its tokens, reusing cached ones.

        Groups with a window get blocks for the first step only, but there must be room for what
        they hold at most. Sets `num_computed_tokens` to what the cache supplied.

        Args:
            first_step: tokens of the first step.
            max_new_tokens: tokens of any later step.
            reserve: blocks of each group that must remain for sequences that already run.

        Returns:
            False, and nothing changed, if there are not enough blocks.
        """
        assert not seq.block_tables, "only a sequence without blocks is admitted"
        prefix = self._cached_prefix(seq)
        if self._admit_behind(prefix, seq, first_step, max_new_tokens, reserve):
            return True
        # Cached blocks may lie on more pages than as many new ones would take.
        nothing: list[list[int]] = [[] for _ in self.groups]
        return bool(prefix[0]) and self._admit_behind(
            nothing, seq, first_step, max_new_tokens, reserve
        )

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make the block tables reach `num_tokens`, after giving back what left the windows.

        Returns:
            False if there are not enough blocks; then the tables are as long as before.
        """
        if self._windows:
            self._release(seq)
        num_blocks = self._blocks_for(num_tokens)
        if min(map(len, seq.block_tables)) >= num_blocks:  # most decodes
            return True
        missing = [max(num_blocks - len(table), 0) for table in seq.block_tables]
        if sum(missing) <= len(self._free_pages):  # room, however many of them a page holds
            self._extend(seq, missing, evict=False)
            return True
        if not self._has_room(missing, [[] for _ in missing], [0] * len(missing)):
            return False
        self._extend(seq, missing, evict=self._is_short(missing))
        return True

    def turning(self, starts: Iterable[int]) -> tuple[int, ...]:
        """Which of some sequences that computed a token in the step before, and compute one behind
        so many now, have to `grow`; the others keep their blocks."""
        size, turns = self.block_size, self._turns
        return tuple([index for index, start in enumerate(starts) if start % size in turns])

    def filled(self, starts: Iterable[int]) -> list[int]:
        """Which of some sequences, that computed one token behind so many, `remember` is for."""
        last = self.block_size - 1
        if not self._caching:
            return []
        return [index for index, start in enumerate(starts) if start % self.block_size == last]

    def remember(self, seq: Sequence, num_new_tokens: int) -> None:
        """Make blocks findable that the last `num_new_tokens` computed tokens have filled."""
        if not self._caching:
            return
        first = (seq.num_computed_tokens - num_new_tokens) // self.block_size
        num_full = seq.num_computed_tokens // self.block_size
        if first == num_full:  # most decodes
            return
        seq.hash_blocks(num_full, self.block_size)
        for pool, table in zip(self._pools, seq.block_tables, strict=True):
            for index in range(first, num_full):
                pool.remember(table[index], seq.block_hashes[index])

    def free(self, seq: Sequence) -> None:
        """Give back all blocks; the tail first, because beginnings are shared most."""
        for index, table in enumerate(seq.block_tables):
            for block in reversed(table):
                if block != RELEASED:
                    self._dereference(index, block)
        seq.block_tables.clear()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Compare every count with the block tables of the sequences that hold blocks.

        Raises:
            AssertionError: a block is lost, counted twice, or shared by mistake.
        """
        counted: Counter[tuple[int, int]] = Counter()
        for seq in sequences:
            for index, table in enumerate(seq.block_tables):
                counted.update((index, block) for block in table if block != RELEASED)
        for index, pool in enumerate(self._pools):
            pool.check_integrity({b: n for (i, b), n in counted.items() if i == index})
            assert not any(
                pool.holds_cached(page) != (page in self._cached_pages)
                for page in self._free_pages
                if self._owner[page] == index
            )
            for block in pool.references:
                assert self._owner[pool.page_of(block)] == index, f"block {block} of a lost page"
        used = {(i, self._pools[i].page_of(block)) for i, block in counted}
        for page in range(self.num_pages):
            is_used = any((index, page) in used for index in range(len(self.groups)))
            assert is_used != (page in self._free_pages), f"page {page} free and used"
        if not self._caching:
            assert all(count == 1 for count in counted.values()), "a block has two owners"
            assert not any(pool.block_of_hash for pool in self._pools), "cached without caching"

    def _admit_behind(
        self,
        prefix: list[list[int]],
        seq: Sequence,
        first_step: int,
        max_new_tokens: int,
        reserve: SequenceOf[int],
    ) -> bool:
        """`admit` with a given prefix, equally many blocks of each group."""
        num_cached = len(prefix[0])
        computed = num_cached * self.block_size
        first_end = min(seq.num_tokens, computed + first_step)
        missing, spoken_for = [], []
        for group, blocks, num_reserved in zip(self.groups, prefix, reserve, strict=True):
            end = seq.num_tokens if group.window is None else first_end
            missing.append(self._blocks_for(end) - num_cached)
            most = group.blocks_at_once(self.block_size, seq.num_tokens, max_new_tokens)
            held = num_cached - blocks.count(RELEASED) + missing[-1]
            spoken_for.append(num_reserved + max(most - held, 0))
        if not self._has_room(missing, prefix, spoken_for):
            return False
        for index, blocks in enumerate(prefix):
            for block in blocks:
                if block != RELEASED:
                    self._reference(index, block)
        seq.block_tables.extend(array("i", blocks) for blocks in prefix)
        self._extend(seq, missing, evict=self._is_short(missing))
        seq.num_computed_tokens = computed
        return True

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _is_short(self, missing: list[int]) -> bool:
        """Whether there are not enough pages beside blocks that are cached on pages in use. A group
        may only spare those where no other group then lacks a page."""
        beside_cached = sum(
            -(-max(num_missing - pool.num_empty, 0) // pool.group.blocks_per_page)
            for pool, num_missing in zip(self._pools, missing, strict=True)
        )
        return beside_cached > len(self._free_pages)

    def _extend(self, seq: Sequence, missing: list[int], *, evict: bool) -> None:
        for index, num_missing in enumerate(missing):
            blocks = [self._take(index, evict=evict) for _ in range(num_missing)]
            seq.block_tables[index].extend(blocks)

    def _has_room(
        self, missing: list[int], prefix: list[list[int]], reserve: SequenceOf[int]
    ) -> bool:
        """Whether so many blocks of each group can be taken beside the cached ones of a prefix."""
        pages = 0
        revived: set[int] = set()
        for pool, num_missing, blocks, num_reserved in zip(
            self._pools, missing, prefix, reserve, strict=True
        ):
            spare = set(pool.spare)
            for block in blocks:
                if block == RELEASED:
                    continue
                page = pool.page_of(block)
                spare.discard(block)
                if page in self._free_pages and page not in revived:
                    revived.add(page)
                    spare.update(pool.blocks_of(page))
                    spare.discard(block)
            wanted = max(num_missing, 0) + num_reserved - len(spare)
            pages += -(-max(wanted, 0) // pool.group.blocks_per_page)
        return pages + len(revived) <= len(self._free_pages)

    def _take(self, index: int, *, evict: bool) -> int:
        """A block for new content: an empty one of a page in use, else one of a free page; with
        `evict`, one that is cached beside used ones comes before the free page."""
        pool = self._pools[index]
        block = pool.take_spare(cached=evict)
        if block is None:
            assert self._free_pages, "blocks are taken only where there is room"
            page = next(iter(self._free_pages))
            self._remove_free(page)
            owner = self._owner[page]
            if owner is not None:
                self._pools[owner].drop_page(page)
            self._owner[page] = index
            pool.add_page(page)
            block = pool.take_spare(cached=False)
        assert block is not None, "a new page has empty blocks"
        pool.references[block] = 1
        return block

    def _reference(self, index: int, block: int) -> None:
        """Use a block that others use or that is cached."""
        pool = self._pools[index]
        page = pool.page_of(block)
        if page in self._free_pages:
            self._remove_free(page)
            pool.add_page(page)
        pool.spare.pop(block, None)
        pool.references[block] = pool.references.get(block, 0) + 1

    def _dereference(self, index: int, block: int) -> None:
        pool = self._pools[index]
        pool.references[block] -= 1
        if pool.references[block]:
            return
        del pool.references[block]
        pool.add_spare(block)
        page = pool.page_of(block)
        if all(other not in pool.references for other in pool.blocks_of(page)):
            for other in pool.blocks_of(page):
                del pool.spare[other]
            self._add_free(page, cached=pool.holds_cached(page))

    def _add_free(self, page: int, *, cached: bool) -> None:
        self._free_pages[page] = None
        if cached:
            self._cached_pages.add(page)
        else:
            self._free_pages.move_to_end(page, last=False)

    def _remove_free(self, page: int) -> None:
        del self._free_pages[page]
        self._cached_pages.discard(page)

    def _release(self, seq: Sequence) -> None:
        """Give back the blocks that have left the window of their group."""
        for index, window, sink_tokens in self._windows:
            table = seq.block_tables[index]
            first_needed = max(seq.num_computed_tokens - window + 1, 0) // self.block_size
            for at in reversed(range(self._blocks_for(sink_tokens), first_needed)):
                if table[at] == RELEASED:
                    break
                self._dereference(index, table[at])
                table[at] = RELEASED

    def _cached_prefix(self, seq: Sequence) -> list[list[int]]:
        """Cached blocks of each group that the sequence begins with, equally many for all.

        Blocks that have left the window are not needed and stand as `RELEASED`. The sequence's
        last token is never among the cached ones, because it has to be computed to get logits.
        Scoring needs the logits of every token and reuses none.
        """
        empty: list[list[int]] = [[] for _ in self.groups]
        if not self._caching or seq.params is None:
            return empty
        longest = (seq.num_tokens - 1) // self.block_size
        seq.hash_blocks(longest, self.block_size)
        for group, pool in zip(self.groups, self._pools, strict=True):
            if group.window is None:
                longest = pool.num_known(seq.block_hashes[:longest])
        for length in range(longest, 0, -1):
            if all(
                group.window is None
                or pool.knows(seq.block_hashes, group.needed(self.block_size, length))
                for group, pool in zip(self.groups, self._pools, strict=True)
            ):
                return [
                    pool.find(seq.block_hashes[:length], group.needed(self.block_size, length))
                    for group, pool in zip(self.groups, self._pools, strict=True)
                ]
        return empty
