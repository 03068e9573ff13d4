"""`headroom model`: what a server serves, and what it is busy with."""

import json

from google.protobuf.json_format import MessageToDict
from rich.table import Table

from service.commands.connection import (
    ApplicationName,
    Target,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFile,
    connect,
)
from service.commands.options import Json
from service.console import describe, fail, out


def model(
    target: Target = "127.0.0.1:9000",
    application: ApplicationName = "headroom",
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    as_json: Json = False,
) -> None:
    """Show the served model, its heads, its KV cache, and what it is busy with."""
    from service.client import HeadroomError

    with connect(target, application, token_file, tls_ca, tls_cert, tls_key) as client:
        try:
            description, load = client.get_model(), client.get_load()
        except HeadroomError as error:
            fail(str(error))
    if as_json:
        fields = [
            MessageToDict(
                message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
            for message in (description, load)
        ]
        print(json.dumps({"model": fields[0], "load": fields[1]}))
        return
    table = Table(show_header=False, box=None)
    for name, text in describe(description).items():
        table.add_row(name, text)
    table.add_row("load", f"{load.num_running} running, {load.num_waiting} waiting")
    table.add_row(
        "blocks",
        f"{load.kv_blocks_used} used, {load.kv_blocks_cached} cached, {load.kv_blocks_total} total",
    )
    out.print(table)
