"""One measurement: a load on one configuration, with the server's own counters around it."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.load import LoadSpec, LoadSummary
from loadtests.run import run_load
from loadtests.sweep.counters import Counters, read_counters
from loadtests.sweep.plan import Load
from loadtests.sweep.servers import Endpoint
from loadtests.workload import Lengths, Workload


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the clients saw and what the server counted.

    Attributes:
        server: counted between start and end of the load.
        server_cores: CPU seconds of the server per second of the load itself.
        seconds: from start to end, with the start of the load generator.
    """

    summary: LoadSummary
    server: Counters
    server_cores: float
    seconds: float

    @property
    def why_not_counted(self) -> str | None:
        """Why this measurement says nothing about the server; None if it does."""
        if self.summary.client_bound:
            return f"the load generator was busy ({self.summary.client_cpu:.2f} of one core)"
        if self.summary.failures:
            failures = ", ".join(f"{n} {code}" for code, n in self.summary.failures.items())
            return f"requests failed: {failures}"
        counted = (self.server.prompt_tokens, self.server.generation_tokens)
        seen = (self.summary.prompt_tokens, self.summary.output_tokens)
        if counted != seen:
            return (
                f"the server counted {counted[0]:.0f} prompt and {counted[1]:.0f} output tokens, "
                f"the clients {seen[0]} and {seen[1]}"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"why_not_counted": self.why_not_counted}


def measure(endpoint: Endpoint, load: Load, *, seed: int, samples: Path | None) -> Measurement:
    """Put a load on a configuration.

    Args:
        seed: of the prompts.
        samples: where one line per request is written.
    """
    spec = LoadSpec(
        target=endpoint.target,
        application=endpoint.application,
        workload=Workload(
            prompt=Lengths.parse(f"fixed:{load.prompt}"),
            output=Lengths.parse(f"fixed:{load.output}"),
            seed=seed,
        ),
        users=load.clients,
        num_requests=load.num_requests,
    )
    started, cpu = time.perf_counter(), endpoint.cpu_seconds()
    before = read_counters(endpoint.metrics_port)
    summary = run_load(spec, samples)
    server = read_counters(endpoint.metrics_port).since(before)
    cpu = endpoint.cpu_seconds() - cpu
    return Measurement(
        summary=summary,
        server=server,
        # An idle server takes next to nothing while the load generator starts.
        server_cores=cpu / summary.seconds if summary.seconds else 0.0,
        seconds=time.perf_counter() - started,
    )
