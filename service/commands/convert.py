"""`headroom convert`: a checkpoint with fewer key/value heads, or smaller weights."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from models.errors import ModelError
from service.commands.options import Json
from service.console import err, fail, out

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.heads.fidelity import Fidelity

# Those of the original that hold for the converted checkpoint too.
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
_SEQ_LEN = 256
_HELD_OUT_TOKENS = 16_384


def convert(
    model: Annotated[Path, typer.Option(help="Directory with the checkpoint.")],
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
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to calibrate with, its last tenth to report on "
            "[default: Python's standard library]."
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=256)] = 32_768,
    max_kl: Annotated[
        float, typer.Option(min=0, help="Up to this divergence, in nats, it counts as ready.")
    ] = 0.05,
    as_json: Json = False,
) -> None:
    """Merge key/value heads of a trained model, multi-head to grouped-query or multi-query; then
    factorise its projections; then round its weights: what is asked for.

    The report is of text that was not calibrated with. A model with fewer heads or a rank normally
    needs uptraining afterwards: headroom train-demo --start OUTPUT for the bundled ones.
    """
    from safetensors import SafetensorError

    from models.checkpoints.loader import load_model, weight_files
    from models.checkpoints.writer import save_model
    from models.heads.convert import convert as convert_heads
    from models.heads.fidelity import compare
    from models.heads.low_rank import factorise
    from models.heads.text import text_batches
    from models.tokenizer import Tokenizer

    if kv_heads is None and rank is None and weights == "auto":
        fail("nothing is to be changed; allowed: --kv-heads, --rank, --weights int8", code=2)
    if (output / "config.json").exists():
        fail(f"--output is {output}, which holds a model; allowed: another directory", code=2)
    try:
        wanted = None if kv_heads is None else _counts(kv_heads)
        changed = original = load_model(model)
        groups: list[list[list[int]]] | None = None
        tokenizer = Tokenizer.for_model(model, original.config)
        calibration, held_out = _texts(text)
        seq_len = min(_SEQ_LEN, original.config.max_position_embeddings)
        unseen = text_batches(tokenizer, held_out, num_tokens=_HELD_OUT_TOKENS, seq_len=seq_len)
        if wanted is not None or rank is not None:
            batches = text_batches(
                tokenizer, calibration, num_tokens=calibration_tokens, seq_len=seq_len
            )
        if wanted is not None:
            with err.status("merging heads"):
                conversion = convert_heads(
                    original, wanted, batches, method=method, regroup=regroup, refit=refit
                )
            changed, groups = conversion.model, conversion.groups
        if rank is not None:
            with err.status("factorising"):
                changed = factorise(changed, rank, batches)
        save_model(changed, output, weight_dtype=weights)
        saved = load_model(output)
        with err.status("comparing"):
            fidelity = compare(original, saved, unseen)
        sizes = [sum(f.stat().st_size for f in weight_files(path)) for path in (model, output)]
    except (ModelError, OSError, SafetensorError) as error:
        fail(str(error), code=2)
    for name in _COPIED:
        if (model / name).exists():
            shutil.copyfile(model / name, output / name)
    configs = original.config, saved.config
    if as_json:
        _print_json(configs, groups, sizes, fidelity, output, max_kl)
    else:
        _report(configs, sizes, fidelity, output, max_kl)


def _counts(text: str) -> int | list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        fail(f"--kv-heads is {text!r}; allowed: a number, or numbers such as 8,4,2", code=2)
    return counts[0] if len(counts) == 1 else counts


def _texts(file: Path | None) -> tuple[list[str], list[str]]:
    """What to calibrate with, and what to report on."""
    from models.train.corpus import build_corpus
    from models.train.sources import STANDARD_LIBRARY

    if file is None:
        corpus = build_corpus(Path(), (STANDARD_LIBRARY,))
        return corpus.texts("train"), corpus.texts("held_out")
    text = file.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    return [text[:cut]], [text[cut:]]


def _print_json(
    configs: "tuple[ModelConfig, ModelConfig]",
    groups: list[list[list[int]]] | None,
    sizes: list[int],
    fidelity: "Fidelity",
    output: Path,
    max_kl: float,
) -> None:
    kv_bytes = [config.kv_bytes_per_token() for config in configs]
    names = "original", "converted"
    fields = {
        "output": str(output),
        "heads": configs[1].head_label,
        "groups": groups,
        "rank": configs[1].projection_rank,
        "kv_bytes_per_token": dict(zip(names, kv_bytes, strict=True)),
        "file_bytes": dict(zip(names, sizes, strict=True)),
        **asdict(fidelity),
        "ready": fidelity.kl <= max_kl,
    }
    print(json.dumps(fields))


def _report(
    configs: "tuple[ModelConfig, ModelConfig]",
    sizes: list[int],
    fidelity: "Fidelity",
    output: Path,
    max_kl: float,
) -> None:
    before, after = (config.kv_bytes_per_token() for config in configs)
    heads = " -> ".join(config.head_label for config in configs)
    out.print(f"heads   {heads}")
    out.print(f"kv      {before:,} -> {after:,} bytes per token, {1 - after / before:.0%} less")
    out.print(f"file    {sizes[0] / 1e6:.2f} -> {sizes[1] / 1e6:.2f} MB")
    if configs[1].projection_rank is not None:
        out.print(
            f"rank    {configs[1].projection_rank} of each projection; only Headroom reads it"
        )
    out.print(f"loss    {fidelity.original_loss:.4f} -> {fidelity.changed_loss:.4f} nats per token")
    out.print(f"kl      {fidelity.kl:.4f} nats, same first choice {fidelity.agreement:.1%}")
    if fidelity.kl <= max_kl:
        out.print(f"ready   {output}")
    else:
        out.print(
            f"not ready: kl is above {max_kl:g}; conversion of a trained model normally needs "
            f"uptraining\n{output}"
        )
