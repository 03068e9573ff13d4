"""Runs the parity matrix and writes docs/parity.md: `python -m tests.parity.report`."""

import datetime
import os
import platform
import tempfile
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from tests.parity import measure
from tests.parity.row import Row
from tests.parity.rows import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
_COLUMNS = (
    "family, variant",
    "max Δlogit, float32",
    "the same, left-padded",
    "bfloat16 error / theirs",
    "greedy tokens equal",
    "what switching off moves",
)


@dataclass(frozen=True)
class Result:
    """What was measured for one row; None where the model has no such thing."""

    row: Row
    logit_error: float
    padded_error: float | None
    bfloat16_ratio: float
    tokens_equal: bool | None
    powers: dict[str, float]


def run(row: Row) -> Result:
    with tempfile.TemporaryDirectory() as directory:
        pair = measure.make_pair(row, Path(directory))
        ours, theirs = measure.bfloat16_errors(pair)
        prompts = measure.greedy_prompts()
        return Result(
            row=row,
            logit_error=max(measure.logit_error(pair, length) for length in row.lengths),
            padded_error=measure.padded_error(pair) if measure.has_batches(pair) else None,
            bfloat16_ratio=ours / theirs,
            tokens_equal=(
                measure.our_greedy(pair, prompts) == measure.their_greedy(pair, prompts)
                if pair.ours.config.is_causal
                else None
            ),
            powers={name: measure.power(pair, change) for name, change in row.switches.items()},
        )


def render(results: list[Result]) -> str:
    lines = [
        _introduction(),
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * len(_COLUMNS),
        *(f"| {' | '.join(_cells(result))} |" for result in results),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn())
    results: list[Result] = []
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("", total=len(ROWS))
        for row in ROWS:
            progress.update(task, description=row.name)
            results.append(run(row))
            progress.advance(task)
    PAGE.write_text(render(results), encoding="utf-8")
    print(f"{PAGE} has {len(results)} rows")


def _introduction() -> str:
    lengths = ", ".join(map(str, measure.PROMPT_LENGTHS))
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return f"""# Parity with transformers

Every family that Headroom loads, against the same checkpoint in transformers. The models are
tiny, and every parameter is random (biases, norms and sinks too), so that every feature bites.
Measured by `make parity` (`python -m tests.parity.report`); `make test` holds every number to its
bar.

- **max Δlogit**: largest difference of any logit in float32, for sequences of 1, 3, 17 and 40
  tokens (Falcon with ALiBi: 300 too). Bar: {measure.LOGIT_BAR:.0e}. Logits have a standard
  deviation of 0.8 to 2.5. For BERT, the last hidden state.
- **left-padded**: theirs in a batch padded on the left, ours alone. Bar: {measure.LOGIT_BAR:.0e}.
  Empty where the longest sequence of a batch decides how transformers rotates all of them.
- **bfloat16**: our largest error over theirs, both against their float32. Bar: 2.
- **greedy tokens**: {measure.NUM_GENERATED} tokens after prompts of {lengths} tokens, through the
  paged engine with chunked prefill and continuous batching, against `generate`.
- **what switching off moves**: how far the logits move when our model runs without the feature: a
  mistake there would be seen. Bar: {measure.POWER_BAR:.0e}; {measure.FINE_POWER_BAR:.0e} for the
  two forms of GELU, which are nowhere more than 5e-4 apart.

transformers runs its eager attention, but SDPA for Falcon with ALiBi, whose bias the eager code of
this version adds twice. It generates without its cache for Llama with LongRoPE, where its cache
keeps keys that were rotated by the factors of short sequences.

Python {platform.python_version()}, torch {version("torch")},
transformers {version("transformers")}, {_cpu()}, 1 thread, {today}.
"""


def _cells(result: Result) -> tuple[str, ...]:
    return (
        result.row.name,
        f"{result.logit_error:.1e}",
        "" if result.padded_error is None else f"{result.padded_error:.1e}",
        f"{result.bfloat16_ratio:.2f}",
        {True: "yes", False: "no", None: ""}[result.tokens_equal],
        "; ".join(f"{name} {power:.1e}" for name, power in result.powers.items()),
    )


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
