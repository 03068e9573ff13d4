"""The HTTP server of one replica: its metrics, and whether it serves."""

import threading
from collections.abc import Callable, Iterable
from typing import Self
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import structlog
from prometheus_client import CollectorRegistry, start_http_server

_RETRY_SECONDS = 0.5

log = structlog.get_logger()


class MetricsServer:
    """Serves `/metrics` and `/healthz`, on a port that may change and that others may still hold.

    A replica that takes another one's place gets its port when that one has gone; until then it
    counts and nobody scrapes it.

    Args:
        registry: what is served.
        host: the address to bind.
        port: asked again and again; None is not now.
        is_serving: decides between 200 and 503 as the answer of `/healthz`, which orchestrators
            ask: they have no token and no certificate.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: Callable[[], int | None],
        is_serving: Callable[[], bool],
    ) -> None:
        self._registry = registry
        self._host = host
        self._port = port
        self._is_serving = is_serving
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
        metrics = server.get_app()
        assert metrics is not None, "start_http_server sets it"
        server.set_app(_with_health(metrics, self._is_serving))

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._bound, self._close_server = port, close


def _with_health(metrics: WSGIApplication, is_serving: Callable[[], bool]) -> WSGIApplication:
    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/healthz":
            return metrics(environ, start_response)
        status, text = (
            ("200 OK", b"serving\n")
            if is_serving()
            else ("503 Service Unavailable", b"not serving\n")
        )
        start_response(status, [("Content-Type", "text/plain")])
        return [text]

    return application
