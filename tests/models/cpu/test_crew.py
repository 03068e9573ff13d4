"""Threads that stay together: each piece of work is done once, whoever comes, and errors arrive."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models.kernels import needs_library

pytestmark = needs_library

NO_PIECE = -1


def done_by(threads: int, jobs: int, pieces: int, fails: int = NO_PIECE) -> torch.Tensor:
    """Which thread, counted from 1, did each piece of each job, of more threads than cores."""
    torch.set_num_threads(5)  # what all tests share sets it back
    done: torch.Tensor = torch.ops.headroom.done_by_crew(threads, jobs, pieces, fails)
    return done


@given(threads=st.integers(1, 5), jobs=st.integers(0, 30), pieces=st.integers(0, 40))
def test_each_piece_is_done_once_by_a_thread_that_may_come(
    threads: int, jobs: int, pieces: int
) -> None:
    done = done_by(threads, jobs, pieces)
    assert done.shape == (jobs, pieces)
    assert ((done >= 1) & (done <= threads)).all()


def test_other_threads_take_part() -> None:
    assert (done_by(5, 500, 20_000) > 1).any()


@given(threads=st.integers(1, 5), fails=st.integers(0, 99))
def test_an_error_of_any_thread_arrives_and_the_next_crew_works(threads: int, fails: int) -> None:
    with pytest.raises(RuntimeError, match=f"piece {fails} cannot be done"):
        done_by(threads, 10, 10, fails)
    assert (done_by(threads, 10, 10) > 0).all()


def test_calls_of_several_threads_at_the_same_time() -> None:
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(done_by, 3, 50, 200) for _ in range(8)]
        assert all(((call.result() >= 1) & (call.result() <= 3)).all() for call in calls)


def test_threads_that_sleep_are_woken_at_the_end() -> None:
    """A thread that may not come waits for longer than it looks, and then sleeps."""
    assert (done_by(2, 2, 3_000_000) > 0).all()
    assert (done_by(5, 10, 10) > 0).all()
