"""`headroom convert`: a checkpoint with fewer key/value heads."""

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
    from models.heads.convert import Conversion
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
        str, typer.Option(help="Key/value heads of every layer, or one number for each: 8,4,2.")
    ],
    method: Annotated[
        Literal["first", "mean", "align"],
        typer.Option(help="A group becomes its first head, its mean, or its mean once aligned."),
    ] = "align",
    regroup: Annotated[bool, typer.Option(help="Put heads that are alike into a group.")] = True,
    refit: Annotated[
        bool, typer.Option(help="Fit output projections to what the original hands on.")
    ] = True,
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
    """Merge key/value heads of a trained model: multi-head to grouped-query or multi-query.

    The report is of text that was not calibrated with. Conversion of a trained model normally
    needs uptraining afterwards: headroom train-demo --start OUTPUT for the bundled ones.
    """
    from models.checkpoints.loader import load_model
    from models.checkpoints.writer import save_model
    from models.heads.convert import convert as convert_heads
    from models.heads.fidelity import compare
    from models.heads.text import text_batches
    from models.tokenizer import Tokenizer

    if (output / "config.json").exists():
        fail(f"--output is {output}, which holds a model; allowed: another directory", code=2)
    try:
        wanted = _counts(kv_heads)
        original = load_model(model)
        tokenizer = Tokenizer.for_model(model, original.config)
        calibration, held_out = _texts(text)
        seq_len = min(_SEQ_LEN, original.config.max_position_embeddings)
        batches = text_batches(
            tokenizer, calibration, num_tokens=calibration_tokens, seq_len=seq_len
        )
        unseen = text_batches(tokenizer, held_out, num_tokens=_HELD_OUT_TOKENS, seq_len=seq_len)
        with err.status("merging heads"):
            conversion = convert_heads(
                original, wanted, batches, method=method, regroup=regroup, refit=refit
            )
        with err.status("comparing"):
            fidelity = compare(original, conversion.model, unseen)
        save_model(conversion.model, output)
    except (ModelError, OSError) as error:
        fail(str(error), code=2)
    for name in _COPIED:
        if (model / name).exists():
            shutil.copyfile(model / name, output / name)
    _report(original.config, conversion, fidelity, output, max_kl=max_kl, as_json=as_json)


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


def _report(
    original: "ModelConfig",
    conversion: "Conversion",
    fidelity: "Fidelity",
    output: Path,
    *,
    max_kl: float,
    as_json: bool,
) -> None:
    config = conversion.model.config
    before, after = original.kv_bytes_per_token(), config.kv_bytes_per_token()
    is_ready = fidelity.kl <= max_kl
    if as_json:
        fields = {
            "output": str(output),
            "heads": config.head_label,
            "groups": conversion.groups,
            "kv_bytes_per_token": {"original": before, "converted": after},
            **asdict(fidelity),
            "ready": is_ready,
        }
        print(json.dumps(fields))
        return
    out.print(f"heads   {original.head_label} -> {config.head_label}")
    out.print(f"kv      {before:,} -> {after:,} bytes per token, {1 - after / before:.0%} less")
    out.print(f"loss    {fidelity.original_loss:.4f} -> {fidelity.changed_loss:.4f} nats per token")
    out.print(f"kl      {fidelity.kl:.4f} nats, same first choice {fidelity.agreement:.1%}")
    if is_ready:
        out.print(f"ready   {output}")
    else:
        out.print(
            f"not ready: kl is above {max_kl:g}; conversion of a trained model normally needs "
            f"uptraining\n{output}"
        )
