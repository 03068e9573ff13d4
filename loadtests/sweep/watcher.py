"""A sweep on a terminal: a bar with the remaining time; elsewhere a line per run."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loadtests.sweep.measure import Measurement
from loadtests.sweep.runner import Job

# The remaining time follows from all that has passed, not from the last minute.
_SPEED_SECONDS = 24 * 3600.0


class ConsoleWatcher:
    """Use as a context manager.

    Args:
        num_jobs: runs that are to be measured.
    """

    def __init__(self, console: Console, num_jobs: int) -> None:
        self._console = console
        self._num_jobs = num_jobs
        self._num_done = 0
        self._expected = 0.0
        self._expected_done = 0.0
        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=_SPEED_SECONDS,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, state="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        if not self._console.is_terminal:
            self._console.print(text)

    def estimate(self, seconds: float) -> None:
        self._expected, self._started = seconds, time.monotonic()
        self._progress.reset(self._task, total=seconds, state=f"0/{self._num_jobs}")
        self._console.print(f"{self._num_jobs} runs will take about {_minutes(seconds)}")

    def start(self, job: Job) -> None:
        self._progress.update(self._task, description=job.name)

    def finish(self, job: Job, estimate: float, measured: Measurement) -> None:
        self._num_done += 1
        self._expected_done += estimate
        state = f"{self._num_done}/{self._num_jobs}"
        self._progress.update(self._task, advance=estimate, state=state)
        if measured.why_not_counted is not None:
            self._console.print(f"{job.name} is not counted: {measured.why_not_counted}")
        if not self._console.is_terminal:
            passed = time.monotonic() - self._started
            left = passed * (self._expected / self._expected_done - 1)
            rate = measured.summary.output_tokens_per_s
            self._console.print(
                f"{state} {job.name}: {rate:.1f} tokens/s; about {_minutes(left)} left"
            )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
