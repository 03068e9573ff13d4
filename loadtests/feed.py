"""Which request is next, and when: the part of a load that one process sends."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from loadtests.load import LoadSpec
from loadtests.stages import arrivals
from loadtests.workload import Request


@dataclass(frozen=True, slots=True)
class Turn:
    """A request and when it is due, in seconds since the load began; None is at once."""

    request: Request
    due: float | None


class Feed:
    """Every `processes`-th request, beginning with number `process`.

    All processes draw the same arrivals and take their own of them, so that together they send
    what one process would.

    Args:
        vocab_size: of the served model; prompts are drawn from it.
    """

    def __init__(
        self, spec: LoadSpec, vocab_size: int, *, process: int = 0, processes: int = 1
    ) -> None:
        self._spec = spec
        self._vocab_size = vocab_size
        self._ended = False
        own = slice(process, spec.num_requests, processes)
        self._indices = itertools.islice(itertools.count(), own.start, own.stop, own.step)
        self._moments = itertools.islice(_moments(spec), own.start, own.stop, own.step)

    def next_turn(self, elapsed: float) -> Turn | None:
        """The next request; None if there is no more.

        Args:
            elapsed: seconds since the load began. A request of an open loop that was due in time
                is given however late it is asked for.
        """
        if self.is_over(elapsed):
            return None
        index, due = next(self._indices, None), next(self._moments, None)
        if index is None or (due is not None and self._is_late(due)):
            self._ended = True
            return None
        return Turn(self._spec.workload.request(index, self._vocab_size), due)

    def stop(self) -> None:
        """Give no more."""
        self._ended = True

    def is_over(self, elapsed: float) -> bool:
        """Whether no request will come any more."""
        return self._ended or (self._spec.rate is None and self._is_late(elapsed))

    def _is_late(self, moment: float) -> bool:
        return self._spec.seconds is not None and moment >= self._spec.seconds


def _moments(spec: LoadSpec) -> Iterator[float | None]:
    if spec.rate is None:
        return itertools.repeat(None)
    rng = random.Random(f"{spec.workload.seed}/arrivals")  # noqa: S311, a workload is no secret
    gaps = iter(lambda: rng.expovariate(1.0), None)
    return arrivals(spec.stages, itertools.accumulate(gaps))
