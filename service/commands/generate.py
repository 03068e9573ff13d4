"""`headroom generate`: a stream of text from a server."""

import json
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict

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
from service.console import fail


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    target: Target = "127.0.0.1:9000",
    application: ApplicationName = "headroom",
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Repeats a draw.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be repeated.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds the server may take.")] = None,
    as_json: Json = False,
) -> None:
    """Stream the continuation of a prompt from a server."""
    from service.client import HeadroomError, RequestOptions, Sampling

    sampling: Sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop": stop or [],
    }
    if seed is not None:
        sampling["seed"] = seed
    pieces: list[str] = []
    with connect(target, application, token_file, tls_ca, tls_cert, tls_key) as client:
        try:
            stream = client.generate(prompt, options=RequestOptions(timeout=timeout), **sampling)
            for text in stream:
                pieces.append(text)
                if not as_json:
                    print(text, end="", flush=True)
        except HeadroomError as error:
            fail(str(error))
        except ValueError as error:  # a number that the message cannot hold
            fail(str(error), code=2)
    assert stream.finished is not None, "a stream without error ends with `finished`"
    finished = MessageToDict(stream.finished, preserving_proto_field_name=True)
    if as_json:
        print(json.dumps({"text": "".join(pieces), "token_ids": stream.token_ids, **finished}))
    else:
        print()
