"""Loss against bytes of cache, and against heads removed.

    python -m loadtests.head_curves

Takes a multi-head checkpoint, merges its key/value heads by each method that `headroom convert`
has, and removes heads by each ranking that `headroom prune` has, beside draws. Losses are of text
that was neither calibrated nor trained with. Writes JSON, tables and two pictures to
`loadtests/results/head-curves`.
"""

import json
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import SafetensorError

from loadtests.head_curves.merging import (
    LEARNING_RATE,
    NEEDLE_SHARE,
    REPEAT_SHARE,
    SEED,
    measure_merging,
)
from loadtests.head_curves.removal import measure_removal
from loadtests.head_curves.report import heads_removed_picture, kv_bytes_picture, markdown
from models.checkpoints.bundled import model_name
from models.errors import ModelError
from models.train.evaluate import validation_loss
from service.bench import machine
from service.commands.derived import CalibrationText, CalibrationTokens, Original, SourceModel
from service.console import err, fail, out

RESULTS = Path(__file__).parent.parent / "results" / "head-curves"


def main(
    model: SourceModel = "demo",
    text: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 32_768,
    uptrain_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens to train aligned models on; 0: none.")
    ] = 300_000,
    draws: Annotated[int, typer.Option(min=1, help="Random rankings, seeds from 0 on.")] = 8,
    results: Annotated[Path, typer.Option(help="Where the result files go.")] = RESULTS,
) -> None:
    """Measure merged and removed heads of one model, and draw both."""
    try:
        original = Original.load(model, text)
        results.mkdir(parents=True, exist_ok=True)  # before a quarter of an hour of work
        document = _measure(original, calibration_tokens, uptrain_tokens, draws)
        document["text"] = "Python's standard library" if text is None else str(text)
        tables = markdown(document)
        for name, content in (
            ("curves.json", json.dumps(document, indent=1) + "\n"),
            ("kv-bytes.svg", kv_bytes_picture(document)),
            ("heads-removed.svg", heads_removed_picture(document)),
            ("curves.md", tables),
        ):
            (results / name).write_text(content, encoding="utf-8")
    except (ModelError, OSError, SafetensorError) as error:
        fail(str(error), code=2)
    out.print(tables)


def _measure(
    original: Original, calibration_tokens: int, uptrain_tokens: int, draws: int
) -> dict[str, Any]:
    calibration = original.batches(calibration_tokens)
    held_out = torch.cat(original.held_out_batches())
    config = original.model.config
    with _Stages() as stages:
        merging = measure_merging(
            original, calibration, held_out, uptrain_tokens=uptrain_tokens, tell=stages.tell
        )
        removal = measure_removal(
            original.model, calibration, held_out, draws=draws, tell=stages.tell
        )
    return {
        "date": date.today().isoformat(),
        "command": f"python -m loadtests.head_curves {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(torch.device("cpu")),
        "model": model_name(original.path),
        "heads": f"{config.head_label}, {config.num_layers} layers",
        "num_heads": sum(heads.num_kv_heads for heads in config.layers),
        "calibration_tokens": sum(ids.numel() for ids in calibration),
        "held_out_tokens": held_out.numel(),
        "uptrain_tokens": uptrain_tokens,
        "uptrain_learning_rate": LEARNING_RATE,
        "uptrain_repeat_share": REPEAT_SHARE,
        "uptrain_needle_share": NEEDLE_SHARE,
        "uptrain_seed": SEED,
        "original_loss": validation_loss(original.model, held_out),
        "merging": [asdict(point) for point in merging],
        "removal": asdict(removal),
    }


class _Stages:
    """A progress bar for each stage, from when it begins."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=err)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "_Stages":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage)
        self._progress.update(self._tasks[stage], completed=done, total=total)


if __name__ == "__main__":
    typer.run(main)
