"""Numbers out of an exposition that prometheus-client itself wrote."""

import pytest
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
    start_http_server,
)

from loadtests.sweep.counters import Counters, parse_counters, read_counters
from service.runtimes.ray_environment import free_ports


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    seconds = Histogram("headroom_step_duration_seconds", "", ["model", "phase"], registry=registry)
    for _ in range(3):
        seconds.labels("m", "decode").observe(0.5)
    seconds.labels("m", "prefill").observe(0.25)
    Histogram("headroom_batch_size", "", ["phase"], registry=registry).labels("decode").observe(4)
    read = Counter("headroom_step_kv_bytes", "", ["phase"], registry=registry)
    read.labels("decode").inc(1000)
    read.labels("prefill").inc(1)
    Counter("headroom_generation_tokens", "", registry=registry).inc(12)
    return registry


EXPECTED = Counters(
    decode_steps=3, decode_seconds=1.5, decode_sequences=4, decode_kv_bytes=1000, prefill_steps=1,
    prefill_seconds=0.25, generation_tokens=12,
)  # fmt: skip


def test_series_are_found_by_name_and_phase() -> None:
    text = generate_latest(_registry()).decode()
    assert parse_counters(text) == EXPECTED
    assert parse_counters("") == Counters()
    assert EXPECTED.since(EXPECTED) == Counters()


def test_a_port_is_scraped() -> None:
    port = free_ports(1)[0]
    server, thread = start_http_server(port, "127.0.0.1", _registry())
    try:
        assert read_counters(port) == EXPECTED
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    with pytest.raises(OSError, match="refused"):
        read_counters(port)
