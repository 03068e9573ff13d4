"""The `headroom` command: which commands there are."""

from importlib.metadata import version
from typing import Annotated

import typer

from loadtests.sweep.command import sweep
from service.commands.bench import bench
from service.commands.convert import convert
from service.commands.doctor import doctor
from service.commands.generate import generate
from service.commands.health import health
from service.commands.model import model
from service.commands.plan import plan
from service.commands.prune import prune
from service.commands.serve import serve
from service.commands.token import token
from service.commands.train_demo import train_demo
from service.console import out

app = typer.Typer(
    name="headroom",
    help="Serve decoder transformers over gRPC; the head configuration is a first-class choice.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)


def _version(value: bool) -> None:
    if value:
        out.print(f"headroom {version('headroom')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command(epilog="Example: headroom serve --model ./llama-1b --port 9000 --replicas 2")(serve)
app.command(epilog="Example: headroom doctor --model ./llama-1b --config headroom.yaml")(doctor)
app.command(epilog='Example: headroom generate --max-tokens 64 "def main("')(generate)
app.command(epilog="Example: headroom model --target 127.0.0.1:9000 --json")(model)
app.command(epilog="Example: headroom health --target 127.0.0.1:9000 --timeout 3")(health)
app.command(epilog="Example: headroom bench --heads 12 --kv-heads 12,4,1 --clients 32")(bench)
app.command(
    epilog="Example: headroom plan --heads 12 --kv-heads 4 --memory 8GiB --prompt 512 --output 128"
)(plan)
app.command(epilog="Example: headroom sweep --heads 12 --kv-heads 12,4,1 --clients 1,8,32")(sweep)
app.command(epilog="Example: headroom token alice --scope generate --days 90 >> tokens.yaml")(token)
app.command(
    epilog="Example: headroom convert --model ./llama-1b --kv-heads 4 --output ./llama-1b-gqa4"
)(convert)
app.command(epilog="Example: headroom prune --model demo --remove 10 --output ./demo-pruned")(prune)
app.command(
    "train-demo",
    epilog="Example: headroom train-demo --start ./gqa --teacher models/demo/mha --tokens 1 "
    "--output ./gqa-trained",
)(train_demo)
