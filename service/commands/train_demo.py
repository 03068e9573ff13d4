"""`headroom train-demo`: the bundled models, once more."""

import math
import os
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn

from service.commands.derived import refuse_existing
from service.console import err, fail, out

if TYPE_CHECKING:
    import torch

    from models.train.config import TrainConfig
    from models.train.demo import DemoPaths
    from models.train.trainer import TrainProgress

_CACHE = Path("~/.cache/headroom/corpus")


def train_demo(
    output: Annotated[Path, typer.Option(help="Directory for the checkpoint.")],
    tokens: Annotated[
        float, typer.Option(help="Tokens to train on, in millions.", min=0.001)
    ] = 6.0,
    start: Annotated[
        Path | None, typer.Option(help="Checkpoint to go on from, such as a converted one.")
    ] = None,
    minimal: Annotated[
        bool, typer.Option("--minimal", help="Read the Python standard library alone.")
    ] = False,
    corpus: Annotated[Path, typer.Option(help="Directory for the Debian packages.")] = _CACHE,
    work: Annotated[
        Path | None, typer.Option(help="Directory for the state [default: OUTPUT.training].")
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens per step, a multiple of 1,024; a GPU has room for more.")
    ] = 2048,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 2e-3,
    repeat_share: Annotated[
        float, typer.Option(help="Part of the rows that are random tokens which repeat.")
    ] = 0.1,
    repeat_growth: Annotated[
        float,
        typer.Option(help="Part of the steps in which those become longer and more varied."),
    ] = 0.0,
    needle_share: Annotated[
        float, typer.Option(help="Part of the rows that are text with keys to be found again.")
    ] = 0.02,
    head_dropout: Annotated[float, typer.Option(help="Probability to leave out a head.")] = 0.0,
    head_diversity: Annotated[
        float, typer.Option(help="Factor of a term that pulls heads apart.")
    ] = 0.0,
    head_temperature: Annotated[
        bool, typer.Option("--head-temperature", help="Learn a factor on each head's scores.")
    ] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Gradient checkpointing: less memory, more work.")
    ] = False,
    teacher: Annotated[
        Path | None, typer.Option(help="Checkpoint to learn from, such as what was converted.")
    ] = None,
    distillation: Annotated[
        float | None, typer.Option(help="Its share of the loss, 0 to 1 [default: 0.5].")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train a small model on openly licensed text of Python and Debian packages.

    Ctrl-C keeps what was learned; the same command goes on from there.
    """
    from models.errors import ModelError
    from models.train.config import TrainConfig
    from models.train.corpus import build_corpus
    from models.train.demo import DemoPaths, make_demo
    from models.train.sources import SOURCES, STANDARD_LIBRARY
    from models.train.trainer import REPRODUCIBLE_PRODUCTS
    from service.bench import machine

    if not math.isfinite(tokens):
        fail(f"--tokens is {tokens}; allowed: a finite number, in millions", code=2)
    if output.name in ("", ".."):
        fail(f"--output is {str(output)!r}; allowed: a directory with a name", code=2)
    place = _device(device)
    if place.type == "cuda":
        # Read once, before the first product: without it, sums depend on what else runs there.
        os.environ.setdefault(*REPRODUCIBLE_PRODUCTS)
    if teacher is not None and distillation is None:
        distillation = 0.5
    paths = DemoPaths(output, work or output.with_name(f"{output.name}.training"), start, teacher)
    if not paths.state_file.exists():
        refuse_existing(output)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[state]}"),
    )
    try:
        config = TrainConfig(
            num_tokens=round(tokens * 1e6),
            batch_tokens=batch_tokens,
            learning_rate=learning_rate,
            repeat_share=repeat_share,
            repeat_growth=repeat_growth,
            needle_share=needle_share,
            head_dropout=head_dropout,
            head_diversity=head_diversity,
            head_temperature=head_temperature,
            recompute=recompute,
            distillation=distillation or 0.0,
            seed=seed,
        )
        sources = (STANDARD_LIBRARY,) if minimal else SOURCES
        texts = build_corpus(corpus.expanduser(), sources)
        with Progress(*columns, console=err) as progress, _stop_signal() as should_stop:
            task = progress.add_task("training", total=config.num_steps, state="")

            def show(now: "TrainProgress") -> None:
                state = (
                    f"loss {now.loss:.3f}, {now.tokens_per_second:,.0f} tokens/s, "
                    f"{_duration(now.seconds_left)} left"
                )
                progress.update(task, completed=now.step, state=state)
                if now.point is not None:
                    progress.console.print(
                        f"step {now.step}: loss {now.point.loss:.3f}, validation "
                        f"{now.point.validation_loss:.3f}, repeats {now.point.repeat_loss:.3f}, "
                        f"{state}"
                    )

            bpb = make_demo(
                paths,
                texts,
                config,
                command=_command(config, paths, minimal=minimal, device=place.type),
                machine=machine(place),
                on_step=show,
                should_stop=should_stop,
                device=str(place),
            )
    except ModelError as error:
        fail(str(error), code=2)
    if bpb is None:
        fail(f"interrupted; the state is in {paths.work}, and the same command goes on", code=130)
    out.print(f"{output}: {bpb:.3f} bits per byte on held-out files")


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; the second one ends the process as usual."""
    stopped = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(_signal: int, _frame: object) -> None:
        nonlocal stopped
        stopped = True
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield lambda: stopped
    finally:
        restore()


def _device(name: str) -> "torch.device":
    from service.engine.memory import resolve_device

    try:
        return resolve_device(name)
    except ValueError as error:
        fail(f"--{error}", code=2)


def _command(config: "TrainConfig", paths: "DemoPaths", *, minimal: bool, device: str) -> str:
    """What makes the model again; where packages and state lie does not matter to it."""
    parts = ["headroom", "train-demo", "--output", str(paths.output)]
    parts += ["--tokens", f"{config.num_tokens / 1e6:g}"]
    parts += ["--batch-tokens", str(config.batch_tokens)]
    parts += ["--learning-rate", f"{config.learning_rate:g}", "--seed", str(config.seed)]
    parts += ["--repeat-share", f"{config.repeat_share:g}"]
    parts += ["--needle-share", f"{config.needle_share:g}"]
    if paths.start is not None:
        parts += ["--start", str(paths.start)]
    if paths.teacher is not None:
        parts += ["--teacher", str(paths.teacher)]
    for option, value in (
        ("--repeat-growth", config.repeat_growth),
        ("--distillation", config.distillation),
        ("--head-dropout", config.head_dropout),
        ("--head-diversity", config.head_diversity),
    ):
        if value:
            parts += [option, f"{value:g}"]
    for option, is_on in (
        ("--minimal", minimal),
        ("--head-temperature", config.head_temperature),
        ("--recompute", config.recompute),
    ):
        if is_on:
            parts.append(option)
    if device != "cpu":
        parts += ["--device", device]
    return shlex.join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
