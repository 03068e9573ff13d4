"""Servers that speak TLS are told from those that do not, as Ray's are: gRPC, mutual TLS."""

import asyncio
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from service.runtimes.ray_address import speaks_tls, uses_tls
from tests.certificates import Authority


@contextmanager
def ray_like(*, tls: bool) -> Iterator[str]:
    """The address of a gRPC server that asks its clients for certificates, or is in the clear."""
    server = grpc.server(ThreadPoolExecutor(1))
    if tls:
        authority = Authority("nodes")
        pair = authority.issue("node")
        credentials = grpc.ssl_server_credentials(
            [(pair.key, pair.certificate)], authority.pem, require_client_auth=True
        )
        port = server.add_secure_port("127.0.0.1:0", credentials)
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("tls", [False, True])
def test_a_server_of_grpc(tls: bool) -> None:
    with ray_like(tls=tls) as address:
        assert speaks_tls(address) == tls


async def test_who_hangs_up_speaks_no_tls() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert not await asyncio.to_thread(speaks_tls, f"127.0.0.1:{port}")
    server.close()


def test_nobody_there_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        speaks_tls(f"127.0.0.1:{port}")
    with pytest.raises(OverflowError):
        speaks_tls(f"127.0.0.1:{10**20}")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"RAY_USE_TLS": "0"}, False),
        ({"RAY_USE_TLS": "1"}, True),
        ({"RAY_USE_TLS": "True"}, True),
    ],
)
def test_rays_own_reading_of_its_variable(environment: Mapping[str, str], expected: bool) -> None:
    assert uses_tls(environment) == expected
