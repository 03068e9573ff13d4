"""Blocks: every one is accounted for, and shared only where equal tokens make it equal."""

from collections.abc import Sequence as SequenceOf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.block_manager import BlockManager
from service.engine.sampling_params import SamplingParams
from service.engine.sequence import Sequence

# Tokens of a step that is never too small.
MANY = 1000


def make(
    token_ids: SequenceOf[int], *, namespace: bytes = b"", params: SamplingParams | None = None
) -> Sequence:
    return Sequence(
        seq_id=0,
        token_ids=list(token_ids),
        params=params or SamplingParams(),
        arrival_time=0.0,
        cache_namespace=namespace,
    )


def scoring(token_ids: SequenceOf[int]) -> Sequence:
    return Sequence(seq_id=0, token_ids=list(token_ids), params=None, arrival_time=0.0)


def manager(num_blocks: int = 8, *, caching: bool = True) -> BlockManager:
    """Blocks of four tokens."""
    return BlockManager(num_blocks, 4, enable_prefix_caching=caching)


def compute(blocks: BlockManager, seq: Sequence, num_tokens: int | None = None) -> None:
    """Pretend that a step has computed so many tokens, or all."""
    count = seq.num_uncomputed_tokens if num_tokens is None else num_tokens
    seq.num_computed_tokens += count
    blocks.remember(seq, count)


def admitted(blocks: BlockManager, seq: Sequence) -> Sequence:
    assert blocks.admit(seq, first_step=MANY, max_new_tokens=MANY, reserve=[0])
    return seq


def run(blocks: BlockManager, seq: Sequence) -> Sequence:
    """Admit, compute and free a sequence; returns it with the blocks it had."""
    admitted(blocks, seq)
    compute(blocks, seq)
    table = seq.block_tables[0][:]
    blocks.free(seq)
    blocks.check_integrity([])
    seq.block_tables.append(table)
    return seq


# Accounting


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_are_counted_up(num_tokens: int, expected: int) -> None:
    assert manager().pages_for(num_tokens, MANY) == expected


@pytest.mark.parametrize("caching", [False, True])
def test_what_is_admitted_and_grown_is_used_until_it_is_freed(caching: bool) -> None:
    blocks = manager(8, caching=caching)
    seq = admitted(blocks, make(range(5)))
    assert (blocks.num_used_pages, blocks.num_free_pages) == (2, 6)
    assert blocks.grow(seq, 8)
    assert len(seq.block_tables[0]) == 2, "the second block has room"
    assert blocks.grow(seq, 9)
    assert (blocks.num_used_pages, blocks.num_free_pages) == (3, 5)
    assert len(set(seq.block_tables[0])) == 3
    blocks.check_integrity([seq])
    blocks.free(seq)
    assert seq.block_tables == []
    assert (blocks.num_used_pages, blocks.num_free_pages) == (0, 8)
    blocks.check_integrity([])


def test_growing_gives_all_missing_blocks_or_none() -> None:
    blocks = manager(4)
    seq = admitted(blocks, make(range(4)))
    assert not blocks.grow(seq, 17)
    assert len(seq.block_tables[0]) == 1
    assert blocks.grow(seq, 16)
    assert len(seq.block_tables[0]) == 4
    assert blocks.num_free_pages == 0


def test_admission_keeps_the_reserve() -> None:
    blocks = manager(4)
    seq = make(range(12))
    assert not blocks.admit(seq, first_step=MANY, max_new_tokens=MANY, reserve=[2])
    assert seq.block_tables == []
    assert blocks.num_free_pages == 4
    assert blocks.admit(seq, first_step=MANY, max_new_tokens=MANY, reserve=[1])
    assert blocks.num_free_pages == 1


def test_the_whole_pool_can_be_one_sequence() -> None:
    blocks = manager(4)
    admitted(blocks, make(range(16)))
    assert blocks.num_free_pages == 0
    assert not blocks.admit(make([1]), first_step=MANY, max_new_tokens=MANY, reserve=[0])


def test_a_sequence_with_blocks_is_not_admitted_again() -> None:
    blocks = manager()
    seq = admitted(blocks, make([1]))
    with pytest.raises(AssertionError, match="without blocks"):
        blocks.admit(seq, first_step=MANY, max_new_tokens=MANY, reserve=[0])


def test_integrity_notices_a_block_without_owner() -> None:
    blocks = manager()
    seq = admitted(blocks, make([1]))
    with pytest.raises(AssertionError, match=r"references {0: 1}, tables {}"):
        blocks.check_integrity([])
    seq.block_tables[0] *= 2
    with pytest.raises(AssertionError, match=r"references {0: 1}, tables {0: 2}"):
        blocks.check_integrity([seq])


# Prefix caching


def test_a_second_sequence_reuses_the_full_blocks_of_the_first() -> None:
    blocks = manager()
    first = admitted(blocks, make(range(10)))
    compute(blocks, first)
    second = admitted(blocks, make(range(10)))
    assert second.num_computed_tokens == 8
    assert second.block_tables[0][:2] == first.block_tables[0][:2]
    assert second.block_tables[0][2] != first.block_tables[0][2], (
        "a block that is not full is not shared"
    )
    assert blocks.num_used_pages == 4
    blocks.check_integrity([first, second])


@pytest.mark.parametrize(("num_tokens", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_the_last_token_is_never_taken_from_the_cache(num_tokens: int, cached: int) -> None:
    blocks = manager()
    run(blocks, make(range(12)))
    assert admitted(blocks, make(range(num_tokens))).num_computed_tokens == cached


def test_blocks_can_be_reused_while_their_owner_runs_and_after_it_has_ended() -> None:
    blocks = manager()
    first = admitted(blocks, make(range(9)))
    compute(blocks, first)
    second = admitted(blocks, make(range(9)))
    blocks.free(first)
    blocks.check_integrity([second])
    assert blocks.num_used_pages == 3
    blocks.free(second)
    assert admitted(blocks, make(range(9))).num_computed_tokens == 8


def test_tokens_are_found_only_after_they_have_been_computed() -> None:
    blocks = manager(16)
    first = admitted(blocks, make(range(12)))
    assert admitted(blocks, make(range(12))).num_computed_tokens == 0
    compute(blocks, first, 5)
    assert admitted(blocks, make(range(12))).num_computed_tokens == 4
    compute(blocks, first, 3)
    assert admitted(blocks, make(range(12))).num_computed_tokens == 8


def test_generated_tokens_can_be_reused_too() -> None:
    blocks = manager()
    first = admitted(blocks, make(range(3)))
    compute(blocks, first)
    for token_id in range(3, 9):
        first.token_ids.append(token_id)
        assert blocks.grow(first, first.num_tokens)
        compute(blocks, first)
    assert admitted(blocks, make(range(9))).num_computed_tokens == 8


def test_different_tokens_are_not_shared() -> None:
    blocks = manager(16)
    run(blocks, make([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert admitted(blocks, make([1, 2, 3, 99, 5, 6, 7, 8, 9])).num_computed_tokens == 0
    assert admitted(blocks, make([1, 2, 3, 4, 5, 6, 7, 99, 9])).num_computed_tokens == 4


def test_equal_tokens_after_a_different_beginning_are_not_shared() -> None:
    blocks = manager(16)
    run(blocks, make([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert admitted(blocks, make([5, 6, 7, 8, 9])).num_computed_tokens == 0
    assert admitted(blocks, make([9, 9, 9, 9, 5, 6, 7, 8, 9])).num_computed_tokens == 0


def test_namespaces_are_isolated() -> None:
    blocks = manager(16)
    run(blocks, make(range(9), namespace=b"one"))
    assert admitted(blocks, make(range(9), namespace=b"two")).num_computed_tokens == 0
    assert admitted(blocks, make(range(9))).num_computed_tokens == 0
    assert admitted(blocks, make(range(9), namespace=b"one")).num_computed_tokens == 8


def test_scoring_reuses_nothing_but_leaves_blocks_for_others() -> None:
    blocks = manager()
    run(blocks, make(range(9)))
    scored = admitted(blocks, scoring(range(9)))
    assert scored.num_computed_tokens == 0, "the logits of every token are needed"
    blocks.free(scored)
    blocks = manager()
    run(blocks, scoring(range(9)))
    assert admitted(blocks, make(range(9))).num_computed_tokens == 8


def test_without_caching_nothing_is_shared_or_remembered() -> None:
    blocks = manager(caching=False)
    first = admitted(blocks, make(range(9)))
    compute(blocks, first)
    second = admitted(blocks, make(range(9)))
    assert second.num_computed_tokens == 0
    assert not {*first.block_tables[0]} & {*second.block_tables[0]}
    blocks.free(first)
    blocks.free(second)
    assert blocks.num_cached_pages == 0
    assert admitted(blocks, make(range(9))).num_computed_tokens == 0


def test_only_free_blocks_count_as_cached() -> None:
    blocks = manager()
    seq = admitted(blocks, make(range(9)))
    compute(blocks, seq)
    assert blocks.num_cached_pages == 0
    blocks.free(seq)
    assert (blocks.num_cached_pages, blocks.num_free_pages) == (2, 8)
    admitted(blocks, make(range(5)))
    assert blocks.num_cached_pages == 1


def test_blocks_without_content_are_handed_out_before_cached_ones() -> None:
    blocks = manager(8)
    run(blocks, make(range(9)))
    blocks.free(admitted(blocks, make(range(100, 120))))  # freed later, but never computed
    stranger = admitted(blocks, make(range(200, 224)))
    assert len(stranger.block_tables[0]) == 6
    assert blocks.num_cached_pages == 2


def test_the_oldest_content_is_evicted_first_and_of_one_sequence_its_tail() -> None:
    blocks = manager(6)
    old = run(blocks, make(range(100, 112)))
    new = run(blocks, make(range(200, 212)))
    assert blocks.num_cached_pages == 6
    stranger = admitted(blocks, make(range(300, 320)))
    assert list(stranger.block_tables[0]) == [
        *reversed(old.block_tables[0]),
        *list(reversed(new.block_tables[0]))[:2],
    ]
    blocks.free(stranger)
    assert admitted(blocks, make(range(200, 212))).num_computed_tokens == 4, "the head survived"


def test_reuse_makes_content_young_again() -> None:
    blocks = manager(6)
    old = run(blocks, make(range(100, 112)))
    new = run(blocks, make(range(200, 212)))
    run(blocks, make(range(100, 112)))  # reuses two blocks and computes the third again
    stranger = admitted(blocks, make(range(300, 308)))
    assert not {*stranger.block_tables[0]} & {*old.block_tables[0][:2]}
    assert {*stranger.block_tables[0]} <= {*new.block_tables[0], old.block_tables[0][2]}


def test_an_evicted_block_is_not_found_any_more() -> None:
    blocks = manager(3)
    run(blocks, make(range(9)))
    run(blocks, make(range(100, 112)))
    assert admitted(blocks, make(range(9))).num_computed_tokens == 0


def test_revived_blocks_are_not_counted_as_free_a_second_time() -> None:
    blocks = manager(4)
    run(blocks, make(range(9)))
    other = admitted(blocks, make([77]))
    assert blocks.num_free_pages == 3
    again = make(range(9))
    # Two cached blocks and one new one: all three free blocks, and none for the reserve.
    assert not blocks.admit(again, first_step=MANY, max_new_tokens=MANY, reserve=[1])
    blocks.check_integrity([other])
    assert blocks.admit(again, first_step=MANY, max_new_tokens=MANY, reserve=[0])
    assert again.num_computed_tokens == 8
    blocks.check_integrity([other, again])


def test_blocks_shared_with_a_running_sequence_cost_nothing() -> None:
    blocks = manager(4)
    first = admitted(blocks, make(range(9)))
    compute(blocks, first)
    assert blocks.num_free_pages == 1
    second = admitted(blocks, make(range(9)))
    assert second.num_computed_tokens == 8
    assert blocks.num_free_pages == 0


def test_two_sequences_that_compute_the_same_tokens_at_once_keep_their_own_blocks() -> None:
    blocks = manager(16)
    first, second = admitted(blocks, make(range(9))), admitted(blocks, make(range(9)))
    compute(blocks, first)
    compute(blocks, second)
    assert not {*first.block_tables[0]} & {*second.block_tables[0]}
    blocks.check_integrity([first, second])
    blocks.free(first)
    blocks.free(second)
    assert blocks.num_cached_pages == 2, "one copy is remembered"


@given(
    prompts=st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=1, max_size=14), st.sampled_from([b"", b"x"])
        ),
        min_size=1,
        max_size=8,
    )
)
def test_what_the_cache_supplies_was_computed_from_the_same_tokens(
    prompts: list[tuple[list[int], bytes]],
) -> None:
    """Blocks are labelled with the namespace and tokens they were computed from."""
    blocks = manager(6)
    content: dict[int, tuple[bytes, list[int]]] = {}
    for token_ids, namespace in prompts:
        seq = admitted(blocks, make(token_ids, namespace=namespace))
        assert seq.num_computed_tokens < len(token_ids)
        for index in range(seq.num_computed_tokens // 4):
            expected = (namespace, token_ids[: 4 * (index + 1)])
            assert content[seq.block_tables[0][index]] == expected
        for index in range(seq.num_computed_tokens // 4, len(seq.block_tables[0])):
            content[seq.block_tables[0][index]] = (namespace, token_ids[: 4 * (index + 1)])
        compute(blocks, seq)
        blocks.check_integrity([seq])
        blocks.free(seq)
        blocks.check_integrity([])
    assert blocks.num_free_pages == 6
