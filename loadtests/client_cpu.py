"""How busy a load process itself is: its answers are late when it is."""

import time
from collections import deque
from collections.abc import Callable

_WINDOW_SECONDS = 5.0


def read_clocks() -> tuple[float, float]:
    """Of the wall, and of all threads of this process."""
    return time.perf_counter(), time.process_time()


class CpuMeter:
    """Cores that this process takes, over the busiest five seconds between calls of `update`.

    Args:
        read: two clocks in seconds: of the wall, and of what the process has computed.
    """

    def __init__(self, read: Callable[[], tuple[float, float]] = read_clocks) -> None:
        self._read = read
        self._readings = deque([read()])
        self._busiest = 0.0

    def update(self) -> None:
        """Read the clocks; call it about every second."""
        self._readings.append(self._read())
        while self._readings[-1][0] - self._readings[1][0] >= _WINDOW_SECONDS:
            self._readings.popleft()
        if self._readings[-1][0] - self._readings[0][0] >= _WINDOW_SECONDS:
            self._busiest = max(self._busiest, self._cores())

    def busiest(self) -> float:
        """Of all windows; the whole time if it was shorter than one."""
        self.update()
        return self._busiest or self._cores()

    def _cores(self) -> float:
        (start, used_before), (end, used) = self._readings[0], self._readings[-1]
        return (used - used_before) / max(end - start, 1e-9)
