"""`headroom convert`: a checkpoint with fewer key/value heads, or smaller weights."""

from pathlib import Path
from typing import Annotated, Literal

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


def convert(
    model: SourceModel,
    output: Annotated[Path, typer.Option(help="Directory for the converted one.")],
    kv_heads: Annotated[
        str | None,
        typer.Option(help="Key/value heads of every layer, or one number for each: 8,4,2."),
    ] = None,
    method: Annotated[
        Literal["first", "mean", "align"],
        typer.Option(help="A group becomes its first head, its mean, or its mean once aligned."),
    ] = "align",
    regroup: Annotated[bool, typer.Option(help="Put heads that are alike into a group.")] = True,
    refit: Annotated[
        bool, typer.Option(help="Fit output projections to what the original hands on.")
    ] = True,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Store each projection of the layers as two matrices of a rank."),
    ] = None,
    weights: Annotated[
        Literal["auto", "int8"],
        typer.Option(help="Linear layers as 8 bits, or in the type of the original."),
    ] = "auto",
    text: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 32_768,
    max_kl: MaxKL = 0.05,
    as_json: Json = False,
) -> None:
    """Merge key/value heads of a trained model, multi-head to grouped-query or multi-query; then
    factorise its projections; then round its weights: what is asked for.

    The report is of text that was not calibrated with. A model with fewer heads or a rank normally
    needs uptraining afterwards: headroom train-demo --start OUTPUT for the bundled ones.
    """
    from safetensors import SafetensorError

    from models.errors import ModelError
    from models.heads.convert import convert as convert_heads
    from models.heads.low_rank import factorise

    if kv_heads is None and rank is None and weights == "auto":
        fail("nothing is to be changed; allowed: --kv-heads, --rank, --weights int8", code=2)
    refuse_existing(output)
    try:
        wanted = None if kv_heads is None else _counts(kv_heads)
        original = Original.load(model, text)
        original.check_format()
        changed = original.model
        groups: list[list[list[int]]] | None = None
        if wanted is not None or rank is not None:
            batches = original.batches(calibration_tokens)
        if wanted is not None:
            with err.status("merging heads"):
                conversion = convert_heads(
                    changed, wanted, batches, method=method, regroup=regroup, refit=refit
                )
            changed, groups = conversion.model, conversion.groups
        if rank is not None:
            with err.status("factorising"):
                changed = factorise(changed, rank, batches)
        derived = Derived.write(original, changed, output, weights)
    except (ModelError, OSError, SafetensorError) as error:
        fail(str(error), code=2)
    if as_json:
        derived.print_json(max_kl, groups=groups, rank=rank)
    elif rank is None:
        derived.print(max_kl)
    else:
        derived.print(max_kl, f"rank    {rank} of each projection")


def _counts(text: str) -> int | list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        fail(f"--kv-heads is {text!r}; allowed: a number, or numbers such as 8,4,2", code=2)
    return counts[0] if len(counts) == 1 else counts
