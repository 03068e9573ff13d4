"""What several commands ask for."""

from typing import Annotated

import typer

Target = Annotated[str, typer.Option(help="Where the server listens, as HOST:PORT.")]
ApplicationName = Annotated[str, typer.Option(help="Application, if the server has several.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
