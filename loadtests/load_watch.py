"""Watches the queue of a server from outside, while something else loads it."""

import threading
import time
from types import TracebackType
from typing import Self

from service.client import Client, HeadroomError

_POLL_SECONDS = 0.1
_IDLE_SECONDS = 300.0


class LoadWatch:
    """Asks GetLoad ten times a second, between `with` and its end.

    Args:
        client: of the server; it stays open.

    Attributes:
        max_waiting: most requests that waited at once.
    """

    def __init__(self, client: Client) -> None:
        self.max_waiting = 0
        self._client = client
        self._idle_since: float | None = None
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def wait_until_idle(self, after: float) -> float:
        """When the server had nothing to do, at that moment or later, in seconds since 1970.

        Raises:
            RuntimeError: it is busy for five minutes.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._idle_since is not None, _IDLE_SECONDS):
                raise RuntimeError(f"the server is busy {_IDLE_SECONDS:g} s after the load")
            assert self._idle_since is not None, "waited for"
            return max(after, self._idle_since)

    def _poll(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            try:
                load = self._client.get_load()
            except HeadroomError:
                continue  # too busy to answer is not idle
            with self._changed:
                self.max_waiting = max(self.max_waiting, load.num_waiting)
                if load.num_running or load.num_waiting:
                    self._idle_since = None
                elif self._idle_since is None:
                    self._idle_since = time.time()
                    self._changed.notify_all()
