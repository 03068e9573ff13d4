"""Processes share a load without overlap and without loss."""

import math

import pytest

from loadtests.feed import Feed, Turn
from loadtests.load import LoadSpec
from loadtests.stages import Shape
from loadtests.workload import Lengths, Workload

WORKLOAD = Workload(Lengths.parse("uniform:4-9"), Lengths.parse("fixed:8"))


def spec(
    *,
    rate: float | None = None,
    num_requests: int | None = None,
    seconds: float | None = None,
    shape: Shape = "steady",
) -> LoadSpec:
    return LoadSpec(
        "", WORKLOAD, users=4, rate=rate, num_requests=num_requests, seconds=seconds, shape=shape
    )


def turns(feed: Feed, elapsed: float = 0.0) -> list[Turn]:
    return list(iter(lambda: feed.next_turn(elapsed), None))


@pytest.mark.parametrize(
    "load",
    [
        spec(num_requests=33),
        spec(num_requests=33, rate=5),
        spec(seconds=9, rate=5),
        spec(seconds=9, rate=20, shape="ramp"),
        spec(seconds=9, rate=5, num_requests=20),
    ],
)
def test_any_number_of_processes_sends_what_one_would(load: LoadSpec) -> None:
    alone = turns(Feed(load, 100))
    for processes in (2, 3):
        feeds = [Feed(load, 100, process=at, processes=processes) for at in range(processes)]
        together = [turn for feed in feeds for turn in turns(feed)]
        assert sorted(together, key=lambda turn: turn.request.index) == alone
    assert [turn.request.index for turn in alone] == list(range(len(alone)))
    assert len(alone) == (load.num_requests or len(alone))


def test_a_closed_loop_has_no_times_and_ends_with_them() -> None:
    feed = Feed(spec(seconds=2), 100)
    turn = feed.next_turn(1.9)
    assert turn is not None
    assert turn.due is None
    assert not feed.is_over(1.9)
    assert feed.next_turn(2.0) is None
    assert feed.is_over(2.0)


def test_an_open_loop_gives_late_what_was_due_in_time() -> None:
    load = spec(seconds=10, rate=5)
    feed = Feed(load, 100)
    assert not feed.is_over(math.inf)
    late = turns(feed, elapsed=1e6)
    assert late == turns(Feed(load, 100))
    assert all(turn.due is not None and turn.due < 10 for turn in late)
    assert feed.is_over(0)


def test_a_stopped_feed_gives_no_more() -> None:
    feed = Feed(spec(num_requests=8), 100)
    feed.stop()
    assert feed.is_over(0)
    assert feed.next_turn(0) is None
