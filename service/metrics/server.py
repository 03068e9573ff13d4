"""The HTTP server of one replica's metrics, which also tells probes how the replica is."""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TypeAlias

import structlog
from prometheus_client import CollectorRegistry, start_http_server

_RETRY_SECONDS = 0.5

log = structlog.get_logger()

WsgiApp: TypeAlias = Callable[[dict[str, Any], Any], Iterable[bytes]]
# What probes ask by path: whether it is so.
States: TypeAlias = Mapping[str, Callable[[], bool]]


class MetricsServer:
    """Serves `/metrics` and states, on a port that may change and that somebody may still hold.

    A replica that takes another one's place gets its port when that one has gone; until then it
    counts and nobody scrapes it.

    Args:
        registry: what is served.
        host: the address to bind.
        port: asked again and again; None is not now.
        states: for each path, whether the answer is 200 or 503.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: Callable[[], int | None],
        states: States | None = None,
    ) -> None:
        self._registry = registry
        self._states = states or {}
        self._host = host
        self._port = port
        self._bound: int | None = None
        self._close_server: Callable[[], None] = lambda: None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Bind the port now if that is possible, else when it is."""
        self._bind()
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._close_server()

    def _follow(self) -> None:
        while not self._closed.wait(_RETRY_SECONDS):
            self._bind()

    def _bind(self) -> None:
        port = self._port()
        if port == self._bound:
            return
        self._close_server()
        self._bound, self._close_server = None, lambda: None
        if port is None:
            return
        try:
            server, thread = start_http_server(port, self._host, self._registry)
        except OSError as error:
            log.debug("metrics port is taken", port=port, error=str(error))
            return
        app = server.get_app()
        assert app is not None, "it serves metrics"
        server.set_app(_with_states(app, self._states))

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._bound, self._close_server = port, close


def _with_states(app: WsgiApp, states: States) -> WsgiApp:
    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        state = states.get(environ["PATH_INFO"])
        if state is None:
            return app(environ, start_response)
        holds = state()
        start_response(
            "200 OK" if holds else "503 Service Unavailable", [("Content-Type", "text/plain")]
        )
        return [b"yes\n" if holds else b"no\n"]

    return answer
