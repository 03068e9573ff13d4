"""`headroom prune`: a checkpoint without the heads that matter least."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from service.commands.derived import (
    CalibrationText,
    CalibrationTokens,
    Derived,
    MaxKL,
    Original,
    SourceModel,
    refuse_existing,
)
from service.commands.options import Json
from service.console import err, fail

if TYPE_CHECKING:
    from torch import Tensor

# As `models.heads.importance.Ranking`, which would bring torch into every command.
_Ranking = Literal["weights", "entropy", "gradient", "ablation", "gates", "random"]


def prune(
    model: SourceModel,
    output: Annotated[Path, typer.Option(help="Directory for the pruned one.")],
    remove: Annotated[
        int | None, typer.Option(min=1, help="So many key/value heads, the least important.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Key/value heads that stay in each layer: 8,6,6,4.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="These key/value heads, as layer.head: 0.3,2.1.")
    ] = None,
    ranking: Annotated[
        _Ranking, typer.Option(help="What tells the importance of a head.")
    ] = "ablation",
    mean: Annotated[
        bool,
        typer.Option(help="What a head hands on on average becomes a bias; else it is nothing."),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the rankings gates and random.")] = 0,
    text: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 32_768,
    max_kl: MaxKL = 0.05,
    as_json: Json = False,
) -> None:
    """Remove heads of a trained model, with their part of the key/value cache: those that are
    named, or those that matter least.

    A head is removed with its key/value head: in grouped-query attention that is a group of query
    heads. The report is of text that was not ranked with. A pruned model normally needs uptraining
    afterwards: headroom train-demo --start OUTPUT for the bundled ones.
    """
    from safetensors import SafetensorError

    from models.errors import ModelError
    from models.heads.prune import prune as prune_heads

    if (remove is not None) + (keep is not None) + (heads is not None) != 1:
        fail("what is to go is not clear; allowed: one of --remove, --keep, --heads", code=2)
    refuse_existing(output)
    try:
        named = _places(heads) if heads is not None else []
        counts = _numbers(keep) if keep is not None else None
        original = Original.load(model, text)
        original.check_format()
        batches = original.batches(calibration_tokens)
        if not named:
            named = _least_important(original, batches, ranking, seed, remove, counts)
        with err.status("removing heads"):
            pruned = prune_heads(original.model, named, batches, fold_mean=mean)
        derived = Derived.write(original, pruned, output)
    except (ModelError, OSError, SafetensorError) as error:
        fail(str(error), code=2)
    if as_json:
        derived.print_json(max_kl, removed=named, ranking=None if heads else ranking)
        return
    places = ", ".join(f"{layer}.{head}" for layer, head in named)
    derived.print(max_kl, f"removed {places}")


def _least_important(
    original: Original,
    batches: "Sequence[Tensor]",
    ranking: _Ranking,
    seed: int,
    remove: int | None,
    keep: list[int] | None,
) -> list[tuple[int, int]]:
    from rich.progress import Progress

    from models.heads.importance import least_important, least_important_by_layer, rank_heads

    with Progress(console=err, disable=not err.is_terminal, transient=True) as progress:
        task = progress.add_task(f"ranking heads by {ranking}", total=None)
        scores = rank_heads(
            original.model,
            batches,
            ranking,
            seed=seed,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if keep is not None:
        return least_important_by_layer(scores, keep)
    return least_important(scores, remove or 0)


def _places(text: str) -> list[tuple[int, int]]:
    try:
        return sorted({_place(part) for part in text.split(",")})
    except ValueError:
        fail(f"--heads is {text!r}; allowed: layer.head, such as 0.3,2.1", code=2)


def _place(text: str) -> tuple[int, int]:
    layer, head = text.split(".")
    return int(layer), int(head)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        fail(f"--keep is {text!r}; allowed: one number for each layer, such as 8,6,6,4", code=2)
