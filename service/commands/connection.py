"""How commands reach a server: its address, who calls, and whom to trust."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.console import fail

if TYPE_CHECKING:
    from service.client import Client

Target = Annotated[str, typer.Option(help="Where the server listens, as HOST:PORT.")]
ApplicationName = Annotated[str, typer.Option(help="Application, if the server has several.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="HEADROOM_TOKEN_FILE",
        help="File that holds the bearer token. [default: the variable HEADROOM_TOKEN]",
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        envvar="HEADROOM_TLS_CA",
        help="Certificates (PEM) of who vouches for the server; the connection is then TLS.",
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        envvar="HEADROOM_TLS_CLIENT_CERT", help="The caller's certificate (PEM), for mTLS."
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(envvar="HEADROOM_TLS_CLIENT_KEY", help="Its key (PEM)."),
]


def connect(
    target: str,
    application: str,
    token_file: Path | None,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
) -> "Client":
    """A client; ends with one line if a file cannot be read."""
    import grpc

    from service.client import Client

    if (tls_cert is None) != (tls_key is None):
        fail("--tls-cert and --tls-key belong together; allowed: both or none", code=2)
    if tls_cert is not None and tls_ca is None:
        fail("--tls-cert needs --tls-ca", code=2)
    tls = None
    if tls_ca is not None:
        tls = grpc.ssl_channel_credentials(
            _read(tls_ca, "--tls-ca"),
            None if tls_key is None else _read(tls_key, "--tls-key"),
            None if tls_cert is None else _read(tls_cert, "--tls-cert"),
        )
    # A token on a command line would be in the list of processes and in the shell's history.
    token = os.environ.get("HEADROOM_TOKEN")
    if token_file is not None:
        token = _read(token_file, "--token-file").decode().strip()
    return Client(target, application=application, token=token, tls=tls)


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        fail(f"{flag} is {path}: {error.strerror}", code=2)
