"""How busy a load process is, and how long it waits for a core: both make its times late."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

_WINDOW_SECONDS = 5.0
_THREADS = Path("/proc/self/task")


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


def read_waits() -> dict[str, float]:
    """Seconds that each thread of this process was ready to run but had no core.

    Empty where the kernel does not say (it is not Linux, or has no `schedstat`).
    """
    waits = {}
    for thread in _THREADS.glob("*"):
        try:
            _, waited, _ = (thread / "schedstat").read_text().split()
        except OSError:
            continue  # the thread has ended, or the kernel has no such file
        waits[thread.name] = int(waited) / 1e9
    return waits


class WaitMeter:
    """Seconds per second that the threads of this process wait for a core, from the start on.

    Args:
        read: how long each thread has waited so far; threads come and go.
        clock: seconds.
    """

    def __init__(
        self,
        read: Callable[[], Mapping[str, float]] = read_waits,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._read, self._clock = read, clock
        self._start, self._before = clock(), read()
        self._waited = 0.0

    def update(self) -> None:
        """Read the waits; call it about every second, because those of ended threads are lost."""
        now = self._read()
        self._waited += sum(wait - self._before.get(thread, 0.0) for thread, wait in now.items())
        self._before = now

    def share(self) -> float | None:
        """Seconds of waiting per second; above 1 if several threads wait at once.

        None where the kernel does not say.
        """
        self.update()
        if not self._before:
            return None
        return self._waited / max(self._clock() - self._start, 1e-9)
