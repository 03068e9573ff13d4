"""Run a plan: warm every configuration, then measure them in turns."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loadtests.sweep.configurations import Configuration
from loadtests.sweep.measure import Measurement, measure
from loadtests.sweep.plan import Load, Plan
from loadtests.sweep.results import Results
from loadtests.sweep.servers import Endpoint, serve_configurations

# A warm-up is small; it runs every code path once and shows how fast the configuration is.
_WARM_CLIENTS = 4
_WARM_PROMPT = 128
_WARM_OUTPUT = 16
_WARM_RUNS = 2


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one load on one configuration."""

    configuration: Configuration
    load: Load
    repeat: int

    @property
    def name(self) -> str:
        return f"{self.configuration.name} {self.load.name} #{self.repeat + 1}"


class Watcher(Protocol):
    """Who is told what happens."""

    def stage(self, text: str) -> None:
        """What goes on now."""

    def estimate(self, seconds: float) -> None:
        """How long all jobs will take, by the warm-up."""

    def start(self, job: Job) -> None:
        """A job starts."""

    def finish(self, job: Job, estimate: float, measured: Measurement) -> None:
        """A job ended; so many seconds of the estimate were meant for it."""


def missing_jobs(plan: Plan, results: Results | None) -> list[Job]:
    """What is to be measured, in its order: a disturbance of the machine hits all configurations
    alike, because their runs of a load follow each other."""
    return [
        Job(configuration, load, repeat)
        for repeat in range(plan.repeats)
        for load in plan.loads
        for configuration in plan.configurations
        if results is None or not results.has(configuration.name, load, repeat)
    ]


def unmeasured_checkpoints(plan: Plan, results: Results | None) -> list[Configuration]:
    """Those whose quality is to be measured."""
    known = {} if results is None else results.document["quality"]
    return [
        one for one in plan.configurations if one.directory is not None and one.name not in known
    ]


def run_jobs(plan: Plan, jobs: list[Job], results: Results, watcher: Watcher) -> None:
    """Measure the jobs; each is kept as soon as it is done.

    Raises:
        ServerError: a server ended before it was ready, or did not stop.
        LoadError: the load generator failed.
        OSError: a server does not answer at its metrics port.
    """
    with tempfile.TemporaryDirectory(prefix="headroom-sweep-") as directory:
        names = ", ".join(one.name for one in plan.configurations)
        watcher.stage(f"starting {names}")
        with serve_configurations(plan, Path(directory)) as endpoints:
            needed = {job.configuration.name: job.configuration for job in jobs}
            expected: dict[str, _Speed] = {}
            for name, configuration in needed.items():
                watcher.stage(f"warming {name}")
                expected[name] = _warm(plan, configuration, endpoints[name])
            seconds = [expected[job.configuration.name].seconds(job) for job in jobs]
            watcher.estimate(sum(seconds))
            for job, share in zip(jobs, seconds, strict=True):
                watcher.start(job)
                measured = _run(plan, job, endpoints[job.configuration.name], results)
                watcher.finish(job, share, measured)


def _run(plan: Plan, job: Job, endpoint: Endpoint, results: Results) -> Measurement:
    name, load, repeat = job.configuration.name, job.load, job.repeat
    samples = results.samples_file(name, load, repeat)
    measured = measure(endpoint, load, seed=plan.seed + repeat, samples=samples)
    results.add(name, load, repeat, measured)
    return measured


@dataclass(frozen=True, slots=True)
class _Speed:
    """What a warm-up showed, to guess how long a job will take."""

    overhead: float
    prefill_token: float
    decode_byte: float

    def seconds(self, job: Job) -> float:
        """Prompts take time by their tokens, decode steps by the bytes that they read."""
        model, load = job.configuration.model, job.load
        context = load.prompt + load.output // 2
        num_bytes = job.configuration.weight_bytes + load.clients * model.kv_bytes(context)
        prefill = load.num_requests * load.prompt * self.prefill_token
        decode = load.waves * load.output * num_bytes * self.decode_byte
        return self.overhead + prefill + decode


def _warm(plan: Plan, configuration: Configuration, endpoint: Endpoint) -> _Speed:
    load = Load(
        clients=min(_WARM_CLIENTS, max(load.clients for load in plan.loads)),
        prompt=min(_WARM_PROMPT, max(load.prompt for load in plan.loads)),
        output=min(_WARM_OUTPUT, max(load.output for load in plan.loads)),
        waves=1,
        waiting=True,
    )
    for _ in range(_WARM_RUNS):  # the last one shows the speed
        measured = measure(endpoint, load, seed=plan.seed, samples=None)
    server = measured.server
    steps = max(server.decode_steps, 1)
    read = configuration.weight_bytes + server.decode_kv_bytes / steps
    return _Speed(
        overhead=measured.seconds - measured.summary.seconds,
        prefill_token=server.prefill_seconds / max(server.prompt_tokens, 1),
        decode_byte=server.decode_seconds / steps / read,
    )
