"""The TLS edge before a gRPC server that says what has reached it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from service.certificates import CertificateFiles
from service.runtimes.edge import Addresses, Edge, EdgeError
from service.runtimes.ray_environment import free_ports
from tests.certificates import Authority, Pair


class _Echo(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Answers every unary call with its metadata, and every other with what it is sent."""

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        async def metadata(request: bytes, context: Any) -> bytes:
            return json.dumps(dict(context.invocation_metadata())).encode()

        async def back(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for request in requests:
                yield request

        if details.method == "/echo/Stream":
            return grpc.stream_stream_rpc_method_handler(back)
        return grpc.unary_unary_rpc_method_handler(metadata)


@asynccontextmanager
async def _behind() -> AsyncIterator[tuple[Addresses, Addresses]]:
    """Addresses outside, where nobody listens yet, and behind, where the echo does."""
    ports = free_ports(4)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([_Echo()])
    server.add_insecure_port(f"127.0.0.1:{ports[2]}")
    await server.start()
    try:
        yield Addresses("127.0.0.1", *ports[:2]), Addresses("127.0.0.1", *ports[2:])
    finally:
        await server.stop(0)


def _files(directory: Path, authority: Authority, *, mutual: bool = True) -> CertificateFiles:
    crt, key, ca = (directory / name for name in ("tls.crt", "tls.key", "ca.crt"))
    authority.issue("server").write(crt, key)
    ca.write_bytes(authority.pem)
    return CertificateFiles(crt, key, ca if mutual else None)


def _credentials(authority: Authority, client: Pair | None) -> grpc.ChannelCredentials:
    if client is None:
        return grpc.ssl_channel_credentials(authority.pem)
    return grpc.ssl_channel_credentials(authority.pem, client.key, client.certificate)


async def _ask(
    outside: Addresses, credentials: grpc.ChannelCredentials, *metadata: tuple[str, str]
) -> dict[str, str]:
    async with grpc.aio.secure_channel(outside.target, credentials) as channel:
        ask: Any = channel.unary_unary("/echo/Unary", bytes, bytes)
        answer: bytes = await ask(b"", metadata=metadata)
    return json.loads(answer)  # type: ignore[no-any-return]


async def _until_answered(outside: Addresses, credentials: grpc.ChannelCredentials) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await _ask(outside, credentials)
                return


@pytest.mark.parametrize("mutual", [False, True])
async def test_no_header_says_who_a_client_is(tmp_path: Path, mutual: bool) -> None:
    authority = Authority("a")
    spoofed = ("x-client-cn", "x-ssl-client-verify", "x-forwarded-client-cert", "x-forwarded-for")
    async with _behind() as (outside, behind):
        with Edge(outside, behind, _files(tmp_path, authority, mutual=mutual), tmp_path):
            credentials = _credentials(authority, authority.issue("me") if mutual else None)
            sent = [(name, "boss") for name in spoofed]
            got = await _ask(outside, credentials, *sent, ("authorization", "Bearer t"))
    assert got["authorization"] == "Bearer t"
    assert not {name for name in got if name.startswith("x-")}


async def test_open_streams_survive_new_certificates_of_server_and_clients(tmp_path: Path) -> None:
    first, second = Authority("first"), Authority("second")
    old, new = (_credentials(one, one.issue("me")) for one in (first, second))
    async with _behind() as (outside, behind):
        files = _files(tmp_path, first)
        with Edge(outside, behind, files, tmp_path):
            async with grpc.aio.secure_channel(outside.target, old) as channel:
                stream: Any = channel.stream_stream("/echo/Stream", bytes, bytes)
                call = stream()
                await call.write(b"before")
                assert await call.read() == b"before"
                second.issue("server").write(tmp_path / "tls.crt", tmp_path / "tls.key")
                (tmp_path / "ca.crt").write_bytes(second.pem)
                await _until_answered(outside, new)
                with pytest.raises(grpc.aio.AioRpcError):
                    await _ask(outside, _credentials(second, first.issue("me")))
                await call.write(b"after")
                assert await call.read() == b"after"
                call.cancel()


async def test_a_killed_haproxy_is_started_again(tmp_path: Path) -> None:
    authority = Authority("a")
    credentials = _credentials(authority, None)
    async with _behind() as (outside, behind):
        with Edge(outside, behind, _files(tmp_path, authority, mutual=False), tmp_path):
            await _ask(outside, credentials)
            (haproxy,) = [one for one in psutil.Process().children() if one.name() == "haproxy"]
            haproxy.kill()
            await _until_answered(outside, credentials)
        assert not [one for one in psutil.Process().children() if one.name() == "haproxy"]


async def test_a_taken_port_is_an_error_that_says_so(tmp_path: Path) -> None:
    authority = Authority("a")
    async with _behind() as (outside, behind):
        taken = Addresses(outside.host, behind.port, outside.http_port)
        with (
            pytest.raises(EdgeError, match="Address already in use"),
            Edge(taken, behind, _files(tmp_path, authority), tmp_path),
        ):
            pytest.fail("started")


async def test_http_has_the_health_check_and_nothing_else(tmp_path: Path) -> None:
    """A plain connection, as that of a kubelet."""
    answered = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        answered.set()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nsuccess")
        await writer.drain()
        writer.close()

    async def get(path: str, port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer

    async with _behind() as (outside, behind):
        files = _files(tmp_path, Authority("a"))
        serving = await asyncio.start_server(serve, "127.0.0.1", behind.http_port)
        with Edge(outside, behind, files, tmp_path):
            for path in ("/", "/-/routes", "/-/healthz/x"):
                assert (await get(path, outside.http_port)).startswith(b"HTTP/1.1 404"), path
            assert not answered.is_set()
            assert (await get("/-/healthz", outside.http_port)).endswith(b"success")
        serving.close()
        await serving.wait_closed()
