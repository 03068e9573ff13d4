"""How many replicas Ray Serve is to keep: by the queue and by the key/value cache.

Ongoing requests say little of a replica: a long prompt fills it as much as a hundred short ones.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

WAITING = "num_requests_waiting"
CACHE_USAGE = "kv_cache_usage_ratio"


class Observed(Protocol):
    """What Serve tells a policy; numbers are averages of the last half minute."""

    @property
    def current_num_replicas(self) -> int: ...

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...


class QueueAndCachePolicy:
    """As many replicas as bring queue and cache of each to their targets, whichever asks for more.

    Serve keeps within its bounds and waits before it changes anything. No numbers, no change.

    Args:
        waiting_per_replica: requests that may wait at each.
        cache_usage: share of each key/value cache that may be in use.
    """

    def __init__(self, waiting_per_replica: float = 4.0, cache_usage: float = 0.8) -> None:
        self._targets = {WAITING: waiting_per_replica, CACHE_USAGE: cache_usage}

    def __call__(self, observed: Observed) -> tuple[int, dict[str, Any]]:
        metrics = observed.aggregated_metrics or {}
        wanted = [
            math.ceil(sum(metrics[name].values()) / target)
            for name, target in self._targets.items()
            if metrics.get(name)
        ]
        return max(wanted, default=observed.current_num_replicas), {}
