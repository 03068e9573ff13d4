"""The queue: ordered by priority, deadline and arrival, and overtaking has a bound."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.sequence import Sequence
from service.engine.waiting_queue import WaitingQueue


def make(seq_id: int, *, priority: int = 0, deadline: float | None = None) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        token_ids=[1],
        params=None,
        arrival_time=0.0,
        priority=priority,
        deadline=deadline,
    )


def ids(seqs: Iterator[Sequence]) -> list[int]:
    return [seq.seq_id for seq in seqs]


def filled(*seqs: Sequence, max_bypass: int = 100) -> WaitingQueue:
    queue = WaitingQueue(max_bypass)
    for seq in seqs:
        queue.push(seq)
    return queue


def test_candidates_come_by_priority_then_deadline_then_arrival() -> None:
    queue = filled(
        make(0),
        make(1, deadline=9.0),
        make(2, priority=5),
        make(3, deadline=3.0),
        make(4, priority=5, deadline=50.0),
        make(5),
        make(6, priority=-5, deadline=1.0),
    )
    assert ids(queue.candidates()) == [4, 2, 3, 1, 0, 5, 6]
    assert ids(iter(queue)) == [4, 2, 3, 1, 0, 5, 6]
    assert len(queue) == 7


def test_a_sequence_that_returns_takes_its_old_place() -> None:
    queue = filled(make(3), make(5))
    queue.push(make(4))
    queue.push(make(1))
    assert ids(queue.candidates()) == [1, 3, 4, 5]


def test_removed_sequences_are_no_candidates_and_overtake_nobody() -> None:
    old, gone = make(0), make(1)
    queue = filled(old, gone)
    queue.remove(gone)
    assert ids(queue.candidates()) == [0]
    assert old.num_bypassed == 0


def test_only_later_arrivals_overtake() -> None:
    first, second, third = make(0), make(1), make(2)
    queue = filled(first, second, third)
    queue.admit(second)
    assert (first.num_bypassed, third.num_bypassed) == (1, 0)
    queue.admit(first)
    assert third.num_bypassed == 0


def test_whoever_was_overtaken_often_enough_is_the_only_candidate() -> None:
    low = make(0)
    queue = filled(low, *(make(seq_id, priority=1) for seq_id in range(1, 5)), max_bypass=2)
    for _ in range(2):
        queue.admit(next(queue.candidates()))
    assert low.num_bypassed == 2
    assert ids(queue.candidates()) == [0]
    queue.admit(low)
    assert ids(queue.candidates()) == [3, 4]


def test_of_several_that_were_overtaken_often_enough_the_oldest_comes_first() -> None:
    queue = filled(
        make(0), make(1, priority=1), make(2, priority=2), make(3, priority=3), max_bypass=1
    )
    queue.admit(next(queue.candidates()))
    assert ids(queue.candidates()) == [0]


def test_without_overtaking_the_order_is_arrival() -> None:
    queue = filled(make(0), make(1, priority=9), make(2, deadline=1.0), max_bypass=0)
    admitted: list[int] = []
    while len(queue):
        (candidate,) = queue.candidates()
        queue.admit(candidate)
        admitted.append(candidate.seq_id)
    assert admitted == [0, 1, 2]


def test_the_queue_may_change_while_candidates_are_tried() -> None:
    queue = filled(make(0), make(1), make(2))
    tried = queue.candidates()
    queue.remove(next(tried))
    assert ids(tried) == [1, 2]


def test_a_stranger_cannot_be_removed() -> None:
    with pytest.raises(ValueError, match="not in list"):
        filled(make(0)).remove(make(0))


@given(
    max_bypass=st.integers(0, 4),
    events=st.lists(
        st.one_of(
            # An arrival: priority, deadline, size.
            st.tuples(
                st.integers(-2, 2),
                st.none() | st.floats(0, 9),
                st.integers(1, 8),
            ),
            # An attempt to admit with so much room.
            st.integers(0, 8),
        ),
        max_size=60,
    ),
)
def test_nobody_is_overtaken_more_often_than_allowed(
    max_bypass: int, events: list[tuple[int, float | None, int] | int]
) -> None:
    """Counted apart from the queue: how many later arrivals were admitted before each one."""
    queue = WaitingQueue(max_bypass)
    sizes: dict[int, int] = {}
    overtaken: dict[int, int] = {}
    for event in [*events, *[8] * len(events)]:
        if isinstance(event, tuple):
            priority, deadline, size = event
            seq = make(len(sizes), priority=priority, deadline=deadline)
            sizes[seq.seq_id] = size
            overtaken[seq.seq_id] = 0
            queue.push(seq)
            continue
        fitting = next((seq for seq in queue.candidates() if sizes[seq.seq_id] <= event), None)
        if fitting is not None:
            queue.admit(fitting)
            for waiting in queue:
                overtaken[waiting.seq_id] += waiting.seq_id < fitting.seq_id
                assert waiting.num_bypassed == overtaken[waiting.seq_id]
        assert max(overtaken.values(), default=0) <= max_bypass
    assert len(queue) == 0, "with enough room everybody is admitted"
