"""`headroom train-demo`: the bundled model, once more."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from service.console import err, out


def train_demo(
    output: Annotated[Path, typer.Option(help="Directory for the checkpoint.")],
    minutes: Annotated[float, typer.Option(min=0.01, help="Training time.")] = 25.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train the bundled demo model again, from the sources of the Python standard library."""
    import torch

    from models.train.demo import make_demo
    from models.train.trainer import TrainConfig, TrainProgress

    columns = (
        *Progress.get_default_columns()[:-1],
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("training", total=1.0, state="")

        def show(now: TrainProgress) -> None:
            state = f"loss {now.loss:.3f}, {now.tokens_per_second:,.0f} tokens/s"
            progress.update(task, completed=now.share, state=state)

        bpb = make_demo(
            output,
            TrainConfig(max_seconds=60 * minutes, seed=seed),
            num_threads=torch.get_num_threads(),
            on_step=show,
        )
    out.print(f"{output}: {bpb:.3f} bits per byte on held-out files")
