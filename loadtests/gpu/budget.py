"""How much time a run has left, and what it says on the way."""

import sys
import time
from collections.abc import Callable


class Budget:
    """Seconds of a run. What no longer fits is left out, and said so in the results.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._seconds = seconds
        self.left_out: list[str] = []

    @property
    def passed(self) -> float:
        return self._clock() - self._began

    def begin(self, what: str, seconds: float) -> bool:
        """Whether something that may take so long can still be done; says so either way."""
        fits = self.passed + seconds <= self._seconds
        if not fits:
            self.leave_out(what, "no time is left")
        else:
            print(f"{self.passed:5.0f} s  {what}", file=sys.stderr, flush=True)
        return fits

    def leave_out(self, what: str, reason: str) -> None:
        print(f"{self.passed:5.0f} s  left out: {what}: {reason}", file=sys.stderr, flush=True)
        self.left_out.append(f"{what}: {reason}")
