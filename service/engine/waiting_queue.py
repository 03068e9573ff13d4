"""Who is admitted next: by priority, deadline and arrival, with bounded overtaking."""

import bisect
from collections.abc import Iterator

from service.engine.sequence import Sequence


class WaitingQueue:
    """Sequences that wait for blocks and for a place in the batch.

    Order is priority, then earlier deadline, then arrival. Every time a later arrival is admitted
    first, the ones it overtook are counted up; whoever has been overtaken `max_bypass` times goes
    before all others, and nobody overtakes it any more, so nothing waits for ever.
    """

    def __init__(self, max_bypass: int) -> None:
        self._max_bypass = max_bypass
        self._ordered: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._ordered)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._ordered)

    def push(self, seq: Sequence) -> None:
        bisect.insort(self._ordered, seq, key=lambda waiting: waiting.order)

    def remove(self, seq: Sequence) -> None:
        self._ordered.remove(seq)

    def candidates(self) -> Iterator[Sequence]:
        """Sequences in the order in which they may be admitted.

        A sequence that may not be overtaken comes last: whether it fits or not, the search ends
        with it.
        """
        untouchable = [seq for seq in self._ordered if seq.num_bypassed >= self._max_bypass]
        if untouchable:
            yield min(untouchable, key=lambda seq: seq.seq_id)
        else:
            yield from list(self._ordered)

    def admit(self, seq: Sequence) -> None:
        """Take a sequence out and count those that it overtook."""
        self._ordered.remove(seq)
        for waiting in self._ordered:
            if waiting.seq_id < seq.seq_id:
                waiting.num_bypassed += 1
