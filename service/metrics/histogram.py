"""Histograms as plain numbers, cheap enough for the engine thread."""

import re
import time
from bisect import bisect_left
from collections.abc import Iterable

from prometheus_client.samples import Exemplar

# Upper bounds in seconds: each 1.5 times the one before, 0.1 ms to 12 minutes.
SECONDS = tuple(float(f"{1e-4 * 1.5**power:.4g}") for power in range(40))
# For numbers of sequences and of tokens: powers of 2.
SEQUENCES = tuple(float(2**power) for power in range(11))
TOKENS = tuple(float(2**power) for power in range(21))

# Name and value of an exemplar's labels have at most 128 characters together (OpenMetrics). Clients
# choose ids; characters that need no escape cannot upset whoever reads them.
_EXEMPLAR_ID = re.compile(r"[A-Za-z0-9_.:/-]{1,118}")


class Histogram:
    """Values counted by bucket, with the newest request of each bucket as its exemplar.

    prometheus-client's own takes one value at a time, under locks; here a value costs a binary
    search. One thread writes. Whoever reads meanwhile may see one value more in the sum than in
    the buckets, as with prometheus-client's.

    Args:
        bounds: of the buckets, ascending, without infinity.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._exemplars: dict[int, Exemplar] = {}
        self.sum = 0.0

    def observe(self, value: float, request_id: str = "") -> None:
        bucket = bisect_left(self._bounds, value)
        self._counts[bucket] += 1
        self.sum += value
        if _EXEMPLAR_ID.fullmatch(request_id):
            self._exemplars[bucket] = Exemplar({"request_id": request_id}, value, time.time())

    def observe_all(self, values: Iterable[float]) -> None:
        for value in values:
            self._counts[bisect_left(self._bounds, value)] += 1
            self.sum += value

    def buckets(self) -> list[tuple[str, float, Exemplar | None]]:
        """Upper bound, values up to it, and exemplar of each bucket."""
        counts, exemplars = self._counts.copy(), self._exemplars.copy()
        found: list[tuple[str, float, Exemplar | None]] = []
        total = 0
        for index, (bound, count) in enumerate(zip((*self._bounds, "+Inf"), counts, strict=True)):
            total += count
            found.append((str(bound), float(total), exemplars.get(index)))
        return found
