"""`headroom health`: the exit code that an orchestrator asks for."""

from typing import Annotated

import typer

from service.commands.connection import (
    ApplicationName,
    Target,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFile,
    connect,
)
from service.console import fail, out


def health(
    target: Target = "127.0.0.1:9000",
    application: ApplicationName = "headroom",
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds to wait for an answer.")] = 3.0,
) -> None:
    """Ask whether a server's engine makes progress: exit code 0 if so, 1 if not or no answer."""
    from service.client import HeadroomError

    with connect(target, application, token_file, tls_ca, tls_cert, tls_key) as client:
        try:
            serving = client.is_serving(timeout=timeout)
        except HeadroomError as error:
            fail(str(error))
    if not serving:
        fail(f"{target} is not serving")
    out.print("serving")
