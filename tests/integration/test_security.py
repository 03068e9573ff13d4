"""TLS, mTLS and tokens with real clients over both runtimes, and rotation under open streams."""

import asyncio
import contextlib
import dataclasses
import json
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import typer
import yaml
from typer.testing import CliRunner

from loadtests import agreement, asyncio_client, run, saturation
from loadtests.load import LoadSpec, LoadSummary
from loadtests.workload import Workload
from service.auth.tokens import digest_of
from service.cli import app
from service.client import AsyncClient, Client, HeadroomError
from service.runtimes.ray_environment import free_ports
from tests.certificates import Authority, Pair
from tests.integration.processes import Process
from tests.service.auth.test_gate import METHODS, bearer, outcome

_CLI = ("-c", "from service.cli import app; app()")
_NUM_STREAMS = 32
_STREAM_TOKENS = 2000
_ENTRIES: list[dict[str, Any]] = [
    {"name": "admin", "sha256": digest_of("t-admin"), "scopes": ["admin"]},
    {"name": "generate", "sha256": digest_of("t-generate"), "scopes": ["generate"]},
    {
        "name": "one",
        "sha256": digest_of("t-one"),
        "scopes": ["generate"],
        "max_concurrent": 1,
    },
    {
        "name": "slow",
        "sha256": digest_of("t-slow"),
        "scopes": ["generate"],
        "tokens_per_minute": 6,
    },
    {
        "name": "expired",
        "sha256": digest_of("t-expired"),
        "scopes": ["admin"],
        "expires": "2020-01-01T00:00:00Z",
    },
]


@dataclass(frozen=True, slots=True)
class Secured:
    """A running server, and the files that it follows.

    Attributes:
        client_pair: of the authority of clients, for every client; a server without --client-ca
            does not ask for it.
    """

    runtime: str
    process: Process
    target: str
    directory: Path
    authority: Authority
    clients: Authority
    client_pair: Pair

    def tls(self, authority: Authority | None = None) -> grpc.ChannelCredentials:
        trusted, own = (authority or self.authority).pem, self.client_pair
        return grpc.ssl_channel_credentials(trusted, own.key, own.certificate)

    def client(self, token: str | None, authority: Authority | None = None) -> Client:
        return Client(self.target, token=token, tls=self.tls(authority))

    def rotate(self, pair: Pair) -> None:
        pair.write(self.directory / "tls.crt", self.directory / "tls.key")

    def write_tokens(self, entries: list[dict[str, Any]]) -> None:
        unfinished = self.directory / "tokens.new"
        unfinished.write_text(yaml.safe_dump(entries))
        unfinished.replace(self.directory / "tokens.yaml")


RUNTIMES = ["standalone", pytest.param("ray", marks=pytest.mark.ray)]


@contextlib.contextmanager
def _serving(runtime: str, model: Path, directory: Path, *, mutual: bool) -> Iterator[Secured]:
    """`headroom serve` with certificate and tokens in a directory; at its end nothing is left.

    Args:
        mutual: whether it asks clients for certificates.
    """
    port, http_port = free_ports(2)
    arguments = {
        "--model": model,
        "--runtime": runtime,
        "--port": port,
        "--http-port": http_port,
        "--metrics-port": 0,
        "--tokens": directory / "tokens.yaml",
        "--tls-cert": directory / "tls.crt",
        "--tls-key": directory / "tls.key",
        **({"--client-ca": directory / "client-ca.crt"} if mutual else {}),
    }
    given = [str(part) for pair in arguments.items() for part in pair]
    process = Process(*_CLI, "serve", *given)
    target, clients = f"127.0.0.1:{port}", Authority("clients")
    authorities = Authority("first"), clients, clients.issue("me")
    secured = Secured(runtime, process, target, directory, *authorities)
    (directory / "client-ca.crt").write_bytes(clients.pem)
    secured.rotate(secured.authority.issue("server"))
    secured.write_tokens(_ENTRIES)
    with process:
        ready = process.wait_for(lambda line: line.startswith("ready"))
        assert f"grpcs://{secured.target}" in ready
        yield secured
        family = process.family()
        process.signal(signal.SIGINT)
        assert process.wait() == 0, process.output
        assert psutil.wait_procs(family, timeout=20)[1] == []
        for number in (port, http_port):
            socket.create_server(("127.0.0.1", number)).close()


@pytest.fixture(scope="module", params=RUNTIMES)
def server(
    request: pytest.FixtureRequest, model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secured]:
    """Under Ray all tests have the edge that asks for certificates: another would cost a start."""
    directory, mutual = tmp_path_factory.mktemp("secured"), request.param == "ray"
    with _serving(request.param, model_path, directory, mutual=mutual) as secured:
        yield secured


def _files(server: Secured, token: str) -> dict[str, Path]:
    """Of a client, by the names of flags: its token, whom it trusts, and its certificate."""
    names = ("token_file", "tls_ca", "tls_cert", "tls_key")
    token_file, ca, certificate, key = files = [server.directory / name for name in names]
    token_file.write_text(f"{token}\n")
    ca.write_bytes(server.authority.pem)
    server.client_pair.write(certificate, key)
    return dict(zip(names, files, strict=True))


def test_the_health_check_of_the_image_learns_from_its_environment(server: Secured) -> None:
    """Its command is `headroom health`, and has no flags for tokens and certificates."""
    files = _files(server, "t-generate")
    told = {
        "HEADROOM_TLS_CA": str(files["tls_ca"]),
        "HEADROOM_TLS_CLIENT_CERT": str(files["tls_cert"]),
        "HEADROOM_TLS_CLIENT_KEY": str(files["tls_key"]),
        "HEADROOM_TOKEN_FILE": str(files["token_file"]),
    }
    for environment, code in ((told, 0), (told | {"HEADROOM_TOKEN_FILE": None}, 1)):
        answer = CliRunner().invoke(app, ["health", "--target", server.target], env=environment)
        assert answer.exit_code == code, answer.output


def _refused(client: Client) -> HeadroomError:
    with client, pytest.raises(HeadroomError) as caught:
        client.complete([1], max_tokens=1)
    return caught.value


def _is_answered(client: Client) -> bool:
    with client:
        try:
            client.get_model()
        except HeadroomError:
            return False
    return True


def test_who_trusts_and_has_a_token_is_answered(server: Secured) -> None:
    with server.client("t-generate") as client:
        assert len(client.complete([1], max_tokens=3, ignore_eos=True).token_ids) == 3
    files = _files(server, "t-admin").items()
    flags = [part for name, path in files for part in (f"--{name.replace('_', '-')}", str(path))]
    answer = subprocess.run(
        [sys.executable, *_CLI, "model", "--json", "--target", server.target, *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(answer.stdout)["model"]["layers"][0]["num_kv_heads"] == 2


async def test_load_clients_are_answered(server: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _files(server, "t-generate")
    spec = LoadSpec(
        server.target,
        Workload.parse("fixed:4", "fixed:4"),
        users=2,
        num_requests=4,
        token_file=files["token_file"],
        tls_ca=files["tls_ca"],
        tls_client_cert=files["tls_cert"],
        tls_client_key=files["tls_key"],
    )
    locust = await asyncio.to_thread(run.run_load, spec)
    monkeypatch.setenv("HEADROOM_TOKEN", "t-generate")
    other = await asyncio_client.run_load(dataclasses.replace(spec, token_file=None))
    for summary in (locust, other):
        assert (summary.requests, summary.failures) == (4, {}), summary.failure_messages


@pytest.mark.parametrize("command", [agreement, saturation])
def test_what_measures_a_server_is_answered(
    server: Secured, command: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its first question over TLS and with a token, and then a load with the same files."""
    files = _files(server, "t-generate")
    loads: list[LoadSpec] = []

    def load(spec: LoadSpec, *_: object) -> LoadSummary:
        loads.append(spec)
        raise run.LoadError("enough was seen")

    monkeypatch.setattr(agreement, "_CLIENTS", {"locust": load})
    monkeypatch.setattr(saturation, "run_load", load)
    with pytest.raises(typer.Exit):
        command.main(server.target, **files, results=tmp_path)
    (spec,) = loads
    used = (spec.token_file, spec.tls_ca, spec.tls_client_cert, spec.tls_client_key)
    assert used == tuple(files.values())


@pytest.mark.parametrize(
    ("token", "code", "reason"),
    [
        (None, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING"),
        ("t-nobody", grpc.StatusCode.UNAUTHENTICATED, "TOKEN_UNKNOWN"),
        ("t-expired", grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED"),
    ],
)
def test_a_token_that_is_none(
    server: Secured, token: str | None, code: grpc.StatusCode, reason: str
) -> None:
    error = _refused(server.client(token))
    assert (error.code, error.reason) == (code, reason)


def test_scope_and_limits(server: Secured) -> None:
    with server.client("t-generate") as client, pytest.raises(HeadroomError) as caught:
        client.attend_hidden(np.zeros((1, 64), np.float32), layer=0)
    assert (caught.value.code, caught.value.reason) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "SCOPE_MISSING",
    )
    # The second has connected before there is a first: a handshake may outlast all its tokens.
    with server.client("t-one") as first, server.client("t-one") as second:
        second.get_model()
        stream = first.generate([1], max_tokens=2 * _STREAM_TOKENS, ignore_eos=True)
        texts = iter(stream)
        next(texts)
        error = _refused(second)
        stream.cancel()
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOKEN_BUSY")
    assert error.retry_after == 1
    with server.client("t-slow") as client:
        client.complete([1], max_tokens=10, ignore_eos=True)
    error = _refused(server.client("t-slow"))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOKEN_RATE")
    # Eleven of six were used, and one has to be left: six, at one every ten seconds.
    assert error.retry_after is not None
    assert 30 < error.retry_after <= 60


async def test_no_method_of_any_service_answers_without_a_token(server: Secured) -> None:
    """Enumerated from the descriptors; and whatever the runtime has besides is closed."""
    async with grpc.aio.secure_channel(server.target, server.tls()) as channel:
        for method in METHODS:
            for metadata in ([], bearer("t-nobody")):
                code, _ = await outcome(channel, method, metadata)
                assert code is grpc.StatusCode.UNAUTHENTICATED, method.full_name
            code, _ = await outcome(channel, method, bearer("t-admin"))
            assert code not in (
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.PERMISSION_DENIED,
            ), method.full_name
        for path in (
            "/ray.serve.RayServeAPIService/Healthz",
            "/ray.serve.RayServeAPIService/ListApplications",
            "/headroom.v1.GenerationService/Nothing",
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(path, bytes, bytes)(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, path
        for version in ("v1", "v1alpha"):
            path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.stream_unary(path, bytes, bytes)(iter([b""]))
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, path


async def test_a_replica_asks_for_tokens_on_its_own_port(server: Secured) -> None:
    """In the clear, on all interfaces; docs/security.md says what Ray itself answers there."""
    if server.runtime == "standalone":
        pytest.skip("of Ray")
    (replica,) = (one for one in server.process.family() if one.name().startswith("ray::ServeRep"))
    listening = {one.laddr.port for one in replica.net_connections("tcp") if not one.raddr}
    path = "/ray.serve.RayServeAPIService"
    # Ports of Ray's own, some of them drawn at random, know nothing of Serve's health.
    healthy = {port: await _unasked(port, f"{path}/Healthz") for port in listening}
    (port,) = (port for port, code in healthy.items() if code is grpc.StatusCode.OK)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in METHODS:
            code, _ = await outcome(channel, method, [])
            assert code is grpc.StatusCode.UNAUTHENTICATED, method.full_name
        assert await channel.unary_unary(f"{path}/Healthz", bytes, bytes)(b"") == b"\n\x07success"
        names = await channel.unary_unary(f"{path}/ListApplications", bytes, bytes)(b"")
        assert names == b"\n\x08headroom"
    # Replicas also take calls of other deployments, as pickles: with the cluster's token alone.
    others = [await _unasked(port, "/ray.serve.ASGIService/HandleRequest") for port in listening]
    assert others.count(grpc.StatusCode.UNAUTHENTICATED) == 1


async def _unasked(port: int, path: str) -> grpc.StatusCode:
    """What a port in the clear answers to nothing."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        return await channel.unary_unary(path, bytes, bytes)(b"").code()


def test_a_client_that_does_not_trust_is_not_connected(server: Secured) -> None:
    error = _refused(server.client("t-admin", Authority("another")))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    error = _refused(Client(server.target, token="t-admin"))
    assert error.code is grpc.StatusCode.UNAVAILABLE, "in the clear"


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        (ssl.TLSVersion.TLSv1_1, False),
        (ssl.TLSVersion.TLSv1_2, True),
        (ssl.TLSVersion.TLSv1_3, True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*TLSv1_1 is deprecated:DeprecationWarning")
def test_tls_from_1_2_on(server: Secured, version: ssl.TLSVersion, accepted: bool) -> None:
    context = ssl.create_default_context(cadata=server.authority.pem.decode())
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # else our own side would refuse 1.1
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    files = _files(server, "t-admin")
    context.load_cert_chain(files["tls_cert"], files["tls_key"])
    host, port = server.target.split(":")
    refused = pytest.raises(ssl.SSLError, match=r"ALERT_PROTOCOL_VERSION|EOF")  # of the server
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        contextlib.nullcontext() if accepted else refused,
        context.wrap_socket(plain, server_hostname=host) as wrapped,
    ):
        assert wrapped.selected_alpn_protocol() == "h2"


@dataclass(slots=True)
class Reader:
    """Reads one stream until it has survived the rotation, or to its end."""

    to_its_end: bool
    started: asyncio.Event = field(default_factory=asyncio.Event)
    num_tokens: int = 0

    async def read(self, client: AsyncClient, rotated: asyncio.Event) -> None:
        stream = client.generate([1], max_tokens=_STREAM_TOKENS, temperature=0, ignore_eos=True)
        async for _ in stream:
            self.started.set()
            if rotated.is_set() and not self.to_its_end:
                break
        self.num_tokens = len(stream.token_ids)


async def _answered(server: Secured, token: str, authority: Authority) -> HeadroomError | None:
    """Why a new connection is not answered; None if it is."""
    async with AsyncClient(server.target, token=token, tls=server.tls(authority)) as client:
        try:
            await client.get_model()
        except HeadroomError as error:
            return error
    return None


async def _until(server: Secured, token: str, authority: Authority, *, answered: bool) -> None:
    async with asyncio.timeout(30):
        while (await _answered(server, token, authority) is None) != answered:
            pass


async def test_rotation_drops_no_stream(server: Secured) -> None:
    """Certificate, authority and tokens change under open streams, which end as they would have."""
    second = Authority("second")
    async with AsyncClient(server.target, token="t-admin", tls=server.tls()) as client:
        rotated = asyncio.Event()
        readers = [Reader(to_its_end=number < 2) for number in range(_NUM_STREAMS)]
        reading = [asyncio.create_task(reader.read(client, rotated)) for reader in readers]
        await asyncio.gather(*(reader.started.wait() for reader in readers))
        server.rotate(second.issue("server"))
        await _until(server, "t-admin", second, answered=True)
        assert await _answered(server, "t-admin", server.authority) is not None
        server.write_tokens([{"name": "new", "sha256": digest_of("t-new"), "scopes": ["admin"]}])
        await _until(server, "t-new", second, answered=True)
        error = await _answered(server, "t-admin", second)
        assert error is not None
        assert error.code is grpc.StatusCode.UNAUTHENTICATED
        assert not any(task.done() for task in reading), "all were open meanwhile"
        rotated.set()
        await asyncio.gather(*reading)
    assert [r.num_tokens for r in readers if r.to_its_end] == [_STREAM_TOKENS] * 2
    assert all(0 < r.num_tokens < _STREAM_TOKENS for r in readers if not r.to_its_end)
    server.rotate(server.authority.issue("server"))
    server.write_tokens(_ENTRIES)
    await _until(server, "t-admin", server.authority, answered=True)


async def test_what_cannot_be_used_changes_nothing(server: Secured) -> None:
    server.process.lines.clear()
    server.rotate(Pair(b"nothing", b"nothing"))
    (server.directory / "tokens.yaml").write_text("- {broken")

    async def ask() -> None:
        while not any("certificates not used" in line for line in server.process.lines):
            assert await _answered(server, "t-admin", server.authority) is None

    async with asyncio.timeout(30):
        await ask()
    assert await _answered(server, "t-admin", server.authority) is None
    server.rotate(server.authority.issue("server"))
    server.write_tokens(_ENTRIES)


async def test_an_expired_certificate_is_not_trusted(server: Secured) -> None:
    server.rotate(server.authority.issue("server", expires=timedelta(days=-1)))
    await _until(server, "t-admin", server.authority, answered=False)
    error = await _answered(server, "t-admin", server.authority)
    assert error is not None
    assert error.code is grpc.StatusCode.UNAVAILABLE
    server.rotate(server.authority.issue("server"))
    await _until(server, "t-admin", server.authority, answered=True)


def test_mutual_tls(server: Secured, model_path: Path, tmp_path: Path) -> None:
    """Who has no certificate of the authority of clients is refused, whatever the token."""
    with contextlib.ExitStack() as stack:
        if server.runtime == "standalone":
            mutual = _serving(server.runtime, model_path, tmp_path, mutual=True)
            server = stack.enter_context(mutual)

        def client(pair: Pair | None, token: str | None) -> Client:
            key, certificate = (pair.key, pair.certificate) if pair is not None else (None, None)
            tls = grpc.ssl_channel_credentials(server.authority.pem, key, certificate)
            return Client(server.target, token=token, tls=tls)

        with client(server.clients.issue("me"), "t-generate") as known:
            assert len(known.complete([1], max_tokens=3, ignore_eos=True).token_ids) == 3
        expired = server.clients.issue("me", expires=timedelta(days=-1))
        for pair in (None, Authority("another").issue("me"), expired):
            assert _refused(client(pair, "t-admin")).code is grpc.StatusCode.UNAVAILABLE
        error = _refused(client(server.clients.issue("me"), None))
        assert error.code is grpc.StatusCode.UNAUTHENTICATED, "a certificate is no token"

        others = Authority("others")
        for new, old in ((others, server.clients), (server.clients, others)):
            (server.directory / "client-ca.crt").write_bytes(new.pem)
            deadline = time.monotonic() + 30
            while not _is_answered(client(new.issue("me"), "t-admin")):
                assert time.monotonic() < deadline, "the new authority of clients is not known"
            assert _refused(client(old.issue("me"), "t-admin")).code is grpc.StatusCode.UNAVAILABLE
