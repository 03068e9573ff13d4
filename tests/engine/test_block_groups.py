"""Blocks of several groups of heads in one pool: nothing that is still seen is given back, no page
has two owners, and the plan is what is really taken.

What is visible is decided here by brute force, from the definition of a window.
"""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.engine.block_manager import BlockManager
from service.engine.group_pool import BlockGroup
from service.engine.sampling_params import SamplingParams
from service.engine.sequence import RELEASED, Sequence

GROUPS = st.lists(
    st.builds(
        BlockGroup,
        window=st.none() | st.integers(1, 14),
        sink_tokens=st.integers(0, 6),
        blocks_per_page=st.integers(1, 5),
    ),
    min_size=1,
    max_size=3,
).map(tuple)
# Three texts that part after 13 and after 22 tokens; sequences are beginnings of them.
TEXTS = [[1] * 60, [1] * 13 + [2] * 47, [1] * 22 + [3] * 38]


def make(token_ids: list[int], *, seq_id: int = 0, namespace: bytes = b"") -> Sequence:
    return Sequence(
        seq_id=seq_id,
        token_ids=list(token_ids),
        params=SamplingParams(),
        arrival_time=0.0,
        cache_namespace=namespace,
    )


def visible(group: BlockGroup, query: int) -> Iterator[int]:
    for key in range(query + 1):
        if group.window is None or query - key < group.window or key < group.sink_tokens:
            yield key


class Memory:
    """What lies in the slots of each page; a group that takes a page over overwrites it."""

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.pages: dict[int, tuple[int, dict[int, int]]] = {}

    def run(self, seq: Sequence, num_tokens: int) -> None:
        """Compute so many tokens as a model would: write their slots, read all that they see."""
        start = seq.num_computed_tokens
        end = start + num_tokens
        contents = [
            hash((seq.cache_namespace, *seq.token_ids[: position + 1])) for position in range(end)
        ]
        for index in range(len(self.blocks.groups)):
            for position in range(start, end):
                page, slot = self.place(seq, index, position)
                if page not in self.pages or self.pages[page][0] != index:
                    self.pages[page] = (index, {})
                self.pages[page][1][slot] = contents[position]
        for index, group in enumerate(self.blocks.groups):
            for query in range(start, end):
                for position in visible(group, query):
                    page, slot = self.place(seq, index, position)
                    owner, slots = self.pages[page]
                    assert owner == index, "a page of another group"
                    assert slots[slot] == contents[position], "a slot of another token"
        seq.num_computed_tokens = end
        self.blocks.remember(seq, num_tokens)

    def place(self, seq: Sequence, index: int, position: int) -> tuple[int, int]:
        size = self.blocks.block_size
        block = seq.block_tables[index][position // size]
        assert block != RELEASED, f"position {position} was given back and is still seen"
        page = block // self.blocks.groups[index].blocks_per_page
        assert 0 <= page < self.blocks.num_pages
        return page, block * size + position % size


class BlockLives(RuleBasedStateMachine):
    """Sequences come, grow, are preempted and end, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Sequence] = []
        self.preempted: list[Sequence] = []

    @initialize(
        groups=GROUPS,
        num_pages=st.integers(3, 24),
        block_size=st.integers(1, 5),
        caching=st.booleans(),
    )
    def start(
        self, groups: tuple[BlockGroup, ...], num_pages: int, block_size: int, caching: bool
    ) -> None:
        self.blocks = BlockManager(
            num_pages, block_size, enable_prefix_caching=caching, groups=groups
        )
        self.memory = Memory(self.blocks)
        self.caching = caching

    @rule(
        text=st.sampled_from(TEXTS),
        length=st.integers(1, 40),
        namespace=st.sampled_from([b"", b"", b"other"]),
        max_new_tokens=st.integers(1, 20),
        reserve=st.integers(0, 3),
    )
    def admit(
        self, text: list[int], length: int, namespace: bytes, max_new_tokens: int, reserve: int
    ) -> None:
        self.try_to_admit(make(text[:length], namespace=namespace), max_new_tokens, reserve)

    @precondition(lambda self: self.preempted)
    @rule(max_new_tokens=st.integers(1, 20))
    def admit_again(self, max_new_tokens: int) -> None:
        self.try_to_admit(self.preempted.pop(0), max_new_tokens, reserve=0)

    def try_to_admit(self, seq: Sequence, max_new_tokens: int, reserve: int) -> None:
        before = self.blocks.num_free_pages, self.blocks.num_cached_pages
        if not self.blocks.admit(
            seq,
            first_step=max_new_tokens,
            max_new_tokens=max_new_tokens,
            reserve=[reserve] * len(self.blocks.groups),
        ):
            assert (self.blocks.num_free_pages, self.blocks.num_cached_pages) == before
            assert seq.block_tables == []
            assert seq.num_computed_tokens == 0
            return
        assert len({len(table) for table in seq.block_tables}) > 0
        assert seq.num_computed_tokens < seq.num_tokens, "the last token is always computed"
        if not self.caching:
            assert seq.num_computed_tokens == 0
        self.running.append(seq)
        num_tokens = min(max_new_tokens, seq.num_uncomputed_tokens)
        assert self.blocks.grow(seq, seq.num_computed_tokens + num_tokens), "blocks were given"
        self.memory.run(seq, num_tokens)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), num_tokens=st.integers(1, 20))
    def compute(self, which: int, num_tokens: int) -> None:
        seq = self.running[which % len(self.running)]
        if seq.num_uncomputed_tokens == 0:
            seq.token_ids.append(4)
        num_tokens = min(num_tokens, seq.num_uncomputed_tokens)
        if self.blocks.grow(seq, seq.num_computed_tokens + num_tokens):
            self.memory.run(seq, num_tokens)
        else:
            self.blocks.check_integrity(self.running)
            self.preempt(which)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def preempt(self, which: int) -> None:
        seq = self.running.pop(which % len(self.running))
        self.blocks.free(seq)
        seq.num_computed_tokens = 0
        self.preempted.append(seq)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        self.blocks.free(self.running.pop(which % len(self.running)))

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "blocks"):
            return
        self.blocks.check_integrity(self.running)
        owners: dict[int, int] = {}
        for seq in self.running:
            for index, table in enumerate(seq.block_tables):
                size = self.blocks.groups[index].blocks_per_page
                for block in table:
                    if block != RELEASED:
                        assert owners.setdefault(block // size, index) == index
        assert self.blocks.num_used_pages == len(owners)

    def teardown(self) -> None:
        if hasattr(self, "blocks"):
            for seq in self.running:
                self.blocks.free(seq)
            self.blocks.check_integrity([])
            assert self.blocks.num_free_pages == self.blocks.num_pages


TestBlockLives = BlockLives.TestCase
TestBlockLives.settings = settings(max_examples=200, stateful_step_count=40)


# The plan


def run_alone(
    memory: Memory, num_tokens: int, chunk: int, num_prompt: int, first_chunk: int = 60
) -> int:
    """One sequence from its prompt to so many tokens; returns the most pages it used."""
    blocks = memory.blocks
    seq = make(list(range(num_prompt)))
    assert blocks.admit(
        seq, first_step=chunk, max_new_tokens=chunk, reserve=[0] * len(blocks.groups)
    )
    most = 0
    num_tokens = max(num_tokens, num_prompt)
    while seq.num_computed_tokens < num_tokens:
        if seq.num_uncomputed_tokens == 0:
            seq.token_ids.append(1)
        limit = chunk if seq.num_computed_tokens else min(chunk, first_chunk)
        count = min(limit, seq.num_uncomputed_tokens)
        assert blocks.grow(seq, seq.num_computed_tokens + count), "the plan promised room"
        memory.run(seq, count)
        most = max(most, blocks.num_used_pages)
    blocks.free(seq)
    blocks.check_integrity([])
    return most


@settings(max_examples=200)
@given(
    groups=GROUPS,
    block_size=st.integers(1, 5),
    num_tokens=st.integers(1, 60),
    num_prompt=st.integers(1, 60),
    chunk=st.integers(1, 20),
    caching=st.booleans(),
)
def test_what_is_planned_for_a_sequence_is_enough(
    groups: tuple[BlockGroup, ...],
    block_size: int,
    num_tokens: int,
    num_prompt: int,
    chunk: int,
    caching: bool,
) -> None:
    """In a pool of exactly that size, which an earlier sequence has filled."""
    planner = BlockManager(0, block_size, enable_prefix_caching=False, groups=groups)
    num_pages = planner.pages_for(num_tokens, chunk)
    blocks = BlockManager(num_pages, block_size, enable_prefix_caching=caching, groups=groups)
    num_prompt = min(num_prompt, num_tokens)
    memory = Memory(blocks)
    for _ in range(2):
        assert run_alone(memory, num_tokens, chunk, num_prompt) <= num_pages
    assert blocks.num_free_pages == num_pages


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("chunk", [1, 2, 5, 8])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 9, 10])
def test_what_is_planned_for_a_window_is_taken(window: int, chunk: int, block_size: int) -> None:
    """No page is planned in vain: some first step leads to a place where all are needed."""
    groups = (BlockGroup(window),)
    planner = BlockManager(0, block_size, enable_prefix_caching=False, groups=groups)
    most = max(
        run_alone(
            Memory(BlockManager(60, block_size, enable_prefix_caching=False, groups=groups)),
            60,
            chunk,
            60,
            first_chunk,
        )
        for first_chunk in range(1, chunk + 1)
    )
    assert most == planner.pages_for(60, chunk)


@given(
    groups=GROUPS,
    block_size=st.integers(1, 5),
    num_pages=st.integers(0, 30),
    at_most=st.integers(1, 100),
    chunk=st.integers(1, 20),
)
def test_the_longest_sequence_is_the_last_that_fits(
    groups: tuple[BlockGroup, ...], block_size: int, num_pages: int, at_most: int, chunk: int
) -> None:
    blocks = BlockManager(num_pages, block_size, enable_prefix_caching=False, groups=groups)
    longest = blocks.max_tokens(at_most, chunk)
    assert 0 <= longest <= at_most
    if longest:
        assert blocks.pages_for(longest, chunk) <= num_pages
    if longest < at_most:
        assert blocks.pages_for(longest + 1, chunk) > num_pages


def test_without_windows_a_page_is_a_block_and_a_sequence_takes_what_it_fills() -> None:
    blocks = BlockManager(5, 4, enable_prefix_caching=False)
    assert [blocks.pages_for(n, 1) for n in (1, 4, 5, 20)] == [1, 1, 2, 5]
    assert blocks.max_tokens(1000, 1) == 20
    assert blocks.max_tokens(7, 1) == 7


def test_pages_of_several_groups_are_added_up() -> None:
    """By hand: 10 blocks of everything, two to a page; of the window 3 blocks and 2 for sinks."""
    groups = (BlockGroup(blocks_per_page=2), BlockGroup(window=6, sink_tokens=5))
    blocks = BlockManager(0, 4, enable_prefix_caching=False, groups=groups)
    assert blocks.pages_for(40, 2) == 5 + 3 + 2
    assert blocks.pages_for(4, 2) == 1 + 1, "no more than there are tokens"


# One step after the other, by hand


def tables(seq: Sequence) -> list[list[bool]]:
    """Of each group, which blocks are there."""
    return [[block != RELEASED for block in table] for table in seq.block_tables]


def test_a_window_gives_back_what_no_later_query_sees() -> None:
    groups = (BlockGroup(), BlockGroup(window=5), BlockGroup(window=5, sink_tokens=3))
    blocks = BlockManager(40, 4, enable_prefix_caching=False, groups=groups)
    memory = Memory(blocks)
    seq = make([1] * 21)
    assert blocks.admit(seq, first_step=6, max_new_tokens=6, reserve=[0] * len(blocks.groups))
    assert [len(table) for table in seq.block_tables] == [6, 2, 2], "a window begins small"
    memory.run(seq, 6)
    for num_tokens in (6, 6):
        assert blocks.grow(seq, seq.num_computed_tokens + num_tokens)
        memory.run(seq, num_tokens)
    # The next query is at 18 and sees 14 to 18: blocks 3 and 4, and the first for the sinks.
    assert blocks.grow(seq, 19)
    assert tables(seq) == [
        [True] * 6,
        [False, False, False, True, True],
        [True, False, False, True, True],
    ]
    assert blocks.num_used_pages == 6 + 2 + 3
    blocks.check_integrity([seq])


def test_pages_change_between_groups() -> None:
    groups = (BlockGroup(blocks_per_page=2), BlockGroup(window=2, blocks_per_page=3))
    blocks = BlockManager(3, 4, enable_prefix_caching=False, groups=groups)
    run_alone(Memory(blocks), 16, 4, 16)
    seqs = [make([1] * 4) for _ in range(3)]
    used: list[int] = []
    for seq in seqs:
        assert blocks.admit(seq, first_step=4, max_new_tokens=4, reserve=[0] * len(blocks.groups))
        used.append(blocks.num_used_pages)
    assert used == [2, 2, 3], "the second uses what the first left over, the third half a page"
    assert not blocks.admit(
        make([1] * 9), first_step=4, max_new_tokens=4, reserve=[0] * len(blocks.groups)
    )
    for seq in seqs:
        blocks.free(seq)
    assert run_alone(Memory(blocks), 16, 4, 16) == 3


def test_a_cached_prefix_has_the_blocks_that_are_still_seen_and_no_others() -> None:
    groups = (BlockGroup(), BlockGroup(window=6, sink_tokens=1))
    blocks = BlockManager(40, 4, enable_prefix_caching=True, groups=groups)
    memory = Memory(blocks)
    tokens = list(range(30))
    first = make(tokens[:21])
    assert blocks.admit(first, first_step=99, max_new_tokens=99, reserve=[0] * len(blocks.groups))
    memory.run(first, 21)
    blocks.free(first)
    again = make(tokens[:20] + [99] * 9)
    assert blocks.admit(again, first_step=3, max_new_tokens=3, reserve=[0] * len(blocks.groups))
    assert again.num_computed_tokens == 20
    # The next query is at 20 and sees 15 to 20: block 3 and later, and block 0 for the sink.
    assert tables(again) == [
        [True] * 8,
        [True, False, False, True, True, True],
    ]
    blocks.check_integrity([again])
    memory.run(again, 3)


def test_a_prefix_that_a_window_has_lost_is_computed_again() -> None:
    """Of the window's blocks only the last are still known; the pool was small."""
    groups = (BlockGroup(), BlockGroup(window=3))
    blocks = BlockManager(9, 4, enable_prefix_caching=True, groups=groups)
    memory = Memory(blocks)
    run_alone(memory, 24, 4, 24)
    again, shorter = make([*range(24)]), make([*range(9), 99])
    assert blocks.admit(again, first_step=4, max_new_tokens=4, reserve=[0] * len(blocks.groups))
    assert again.num_computed_tokens == 20
    memory.run(again, 4)
    blocks.free(again)
    assert blocks.admit(shorter, first_step=4, max_new_tokens=4, reserve=[0] * len(blocks.groups))
    assert shorter.num_computed_tokens == 0
    memory.run(shorter, 4)
    blocks.check_integrity([shorter])


@pytest.mark.parametrize(("num_pages", "kept"), [(3, False), (5, True)])
def test_cached_blocks_make_way_only_where_another_group_needs_the_last_page(
    num_pages: int, kept: bool
) -> None:
    """A free page taken for what a cached block could hold would leave the other group none."""
    groups = (BlockGroup(blocks_per_page=2), BlockGroup())
    blocks = BlockManager(num_pages, 1, enable_prefix_caching=True, groups=groups)
    memory = Memory(blocks)
    first, second, third = make([1]), make([2]), make([3])
    for seq in (first, second):
        assert blocks.admit(seq, first_step=1, max_new_tokens=1, reserve=[0] * len(blocks.groups))
        memory.run(seq, 1)
    blocks.free(second)
    assert blocks.num_free_pages == num_pages - 2
    assert blocks.admit(third, first_step=1, max_new_tokens=1, reserve=[0] * len(blocks.groups))
    memory.run(third, 1)
    blocks.check_integrity([first, third])
    blocks.free(third)
    again = make([2, 9])
    if kept:
        assert blocks.admit(again, first_step=1, max_new_tokens=1, reserve=[0] * len(blocks.groups))
        assert again.num_computed_tokens == 1
    else:
        assert not blocks.admit(
            again, first_step=1, max_new_tokens=1, reserve=[0] * len(blocks.groups)
        )
