"""What happens beyond saturation: is the queue bounded, does the service go on, does it recover?

    headroom serve --config loadtests/saturation.yaml
    python -m loadtests.saturation --max-waiting 16 --settings loadtests/saturation.yaml

Finds the rate that the server sustains by a ramp of Poisson arrivals, then offers twice as much.
Writes JSON and a table to `loadtests/results/saturation`. The exit code is that of the load tests:
1 if a check fails, 3 if the load generator was too busy to count.
"""

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.progress import Progress

from loadtests.load import LoadSpec, LoadSummary, StageSummary
from loadtests.load_watch import LoadWatch
from loadtests.options import DEFAULT_TARGET
from loadtests.run import LoadError, run_load
from loadtests.samples import Sample, read_samples
from loadtests.stages import Stage
from loadtests.summary import summarize_stage
from loadtests.workload import Workload
from service.bench import machine
from service.client import Client, HeadroomError
from service.commands.connection import TlsCa, TlsCert, TlsKey, TokenFile, connect
from service.console import err, fail, out

RESULTS = Path(__file__).parent / "results" / "saturation"
OVERLOAD = 2.0
_GOODPUT_SHARE = 0.9
_RECOVERY_SECONDS = 10.0
# A probe after the load may take so many times the first token of an idle server.
_PROBE_FACTOR = 2.0
_PROBE_REQUESTS = 8
# The ramp ends so far above what a closed loop reaches; its best quarter is what is sustained.
_RAMP_TOP = 1.5
_QUARTERS = 4
# Users beyond those that the server can hold, so that an arrival always finds a free one.
_SPARE_USERS = 32
_MAX_DELAY_MS = 1000.0


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    passed: bool
    found: str


@dataclass(frozen=True, slots=True)
class Saturation:
    """What the scenario saw.

    Attributes:
        server: what is served.
        sustained: the best quarter of the ramp; its served rate is the sustainable one.
        overloaded: the last three quarters of the time at twice that rate.
        max_waiting: most requests that waited in the server at once.
        recovery_seconds: from the last arrival until the server had nothing to do.
        idle, probe: a few requests of one user before the load and after it.
    """

    server: str
    sustained: StageSummary
    ramp: LoadSummary
    overload: LoadSummary
    overloaded: StageSummary
    max_waiting: int
    recovery_seconds: float
    idle: LoadSummary
    probe: LoadSummary

    @property
    def client_bound(self) -> bool:
        delay = self.overload.delay_ms
        late = delay is None or delay.p99 > _MAX_DELAY_MS
        return late or any(run.client_bound for run in (self.ramp, self.overload))

    def checks(self, max_waiting: int) -> list[Check]:
        """What has to hold.

        Args:
            max_waiting: the bound of the server's queue.
        """
        rejected = self.overload.failures.get("RESOURCE_EXHAUSTED", 0)
        failed = sum(self.overload.failures.values())
        goodput = self.overloaded.output_tokens_per_s / self.sustained.output_tokens_per_s
        idle, probe = self.idle.ttft_ms, self.probe.ttft_ms
        assert idle is not None, "a server without load answers"
        recovered = probe is not None and probe.p50 <= _PROBE_FACTOR * idle.p50
        return [
            Check("the queue is bounded", self.max_waiting <= max_waiting,
                  f"at most {self.max_waiting} waited, of {max_waiting} allowed"),
            Check("only a full queue refuses, and says when to try again",
                  rejected == failed == self.overload.rejects_with_retry_info > 0,
                  f"{rejected} refused, {failed} failed, "
                  f"{self.overload.rejects_with_retry_info} with RetryInfo"),
            Check(f"goodput is at least {_GOODPUT_SHARE:.0%} of its peak",
                  goodput >= _GOODPUT_SHARE,
                  f"{self.overloaded.output_tokens_per_s:.1f} of "
                  f"{self.sustained.output_tokens_per_s:.1f} tokens/s, {goodput:.0%}"),
            Check(f"idle {_RECOVERY_SECONDS:g} s after the last arrival",
                  self.recovery_seconds <= _RECOVERY_SECONDS,
                  f"after {self.recovery_seconds:.1f} s"),
            Check(f"then the first token takes at most {_PROBE_FACTOR:g} times what it took before",
                  recovered,
                  f"{'no' if probe is None else f'{probe.p50:.1f}'} ms, before {idle.p50:.1f} ms"),
        ]  # fmt: skip


def saturate(
    client: Client,
    base: LoadSpec,
    *,
    max_waiting: int,
    ramp_seconds: float,
    overload_seconds: float,
    progress: Progress,
) -> Saturation:
    """Run the scenario.

    Args:
        client: of the same server, for questions.
        base: where the server is, and what each request asks.

    Raises:
        LoadError: locust failed.
        HeadroomError: the server does not say what it serves.
        RuntimeError: the server served nothing, or was still busy long after the load.
    """
    model = client.get_model()
    task = progress.add_task("", total=5)

    def load(description: str, users: int, path: Path | None = None, **fields: Any) -> LoadSummary:
        progress.update(task, description=description)
        summary = run_load(dataclasses.replace(base, users=users, **fields), path)
        progress.advance(task)
        return summary

    users = model.max_num_seqs + max_waiting + _SPARE_USERS
    idle = load("idle", 1, num_requests=_PROBE_REQUESTS)
    closed = load("closed loop", model.max_num_seqs, seconds=ramp_seconds / _QUARTERS)
    top = _RAMP_TOP * closed.requests_per_s
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "samples.jsonl.gz"
        ramp = load("ramp", users, path, rate=top, seconds=ramp_seconds, shape="ramp")
        sustained = _best_quarter(list(read_samples(path)), ramp.began, ramp_seconds)
        if not sustained.served_per_s:
            raise RuntimeError("the server ended no request of the ramp")
        rate = OVERLOAD * sustained.served_per_s
        with LoadWatch(client) as watch:
            overload = load("overload", users, path, rate=rate, seconds=overload_seconds)
            end = overload.began + overload_seconds
            recovered = watch.wait_until_idle(after=end)
        window = Stage(overload_seconds / _QUARTERS, overload_seconds, rate)
        overloaded = summarize_stage(read_samples(path), window, overload.began)
    probe = load("probe", 1, num_requests=_PROBE_REQUESTS)
    return Saturation(
        server=f"{model.name}, {model.num_parameters / 1e6:.1f} M parameters, "
        f"{model.layers[0].label}, {model.dtype}, {model.max_num_seqs} sequences at once",
        sustained=sustained,
        ramp=ramp,
        overload=overload,
        overloaded=overloaded,
        max_waiting=watch.max_waiting,
        recovery_seconds=recovered - end,
        idle=idle,
        probe=probe,
    )


def _best_quarter(samples: list[Sample], began: float, seconds: float) -> StageSummary:
    length = seconds / _QUARTERS
    quarters = [
        summarize_stage(samples, Stage(number * length, (number + 1) * length, load=0.0), began)
        for number in range(_QUARTERS)
    ]
    return max(quarters, key=lambda quarter: quarter.output_tokens_per_s)


def main(
    target: Annotated[str, typer.Option(help="Where the server listens.")] = DEFAULT_TARGET,
    application: Annotated[str, typer.Option(help="If the server has several.")] = "headroom",
    max_waiting: Annotated[
        int, typer.Option(min=1, help="max_waiting_requests, as the server was started.")
    ] = 256,
    settings: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Of the server; kept with the results."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="Lengths, as fixed:128.")] = "uniform:64-192",
    output: Annotated[str, typer.Option(help="Lengths.")] = "uniform:32-96",
    ramp_seconds: Annotated[float, typer.Option(min=1)] = 60.0,
    overload_seconds: Annotated[float, typer.Option(min=1)] = 60.0,
    seed: Annotated[int, typer.Option()] = 0,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    results: Annotated[Path, typer.Option(help="Where the result files go.")] = RESULTS,
) -> None:
    """Find the sustainable rate, offer twice as much, and check what the service does."""
    try:
        base = LoadSpec(
            target,
            Workload.parse(prompt, output, seed=seed),
            users=1,
            application=application,
            token_file=token_file,
            tls_ca=tls_ca,
            tls_client_cert=tls_cert,
            tls_client_key=tls_key,
        )
        server_settings = yaml.safe_load(settings.read_text()) if settings else None
    except (ValueError, yaml.YAMLError) as error:
        fail(str(error), code=2)
    try:
        with (
            connect(target, application, token_file, tls_ca, tls_cert, tls_key) as client,
            Progress(console=err, disable=not err.is_terminal) as progress,
        ):
            found = saturate(
                client,
                base,
                max_waiting=max_waiting,
                ramp_seconds=ramp_seconds,
                overload_seconds=overload_seconds,
                progress=progress,
            )
    except (LoadError, HeadroomError, RuntimeError) as error:
        fail(str(error))
    checks = found.checks(max_waiting)
    document = {
        "date": date.today().isoformat(),
        "command": f"python -m loadtests.saturation {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(torch.device("cpu")),
        "max_waiting_on_command_line": max_waiting,
        "settings_on_command_line": server_settings,
        "checks": [dataclasses.asdict(check) for check in checks],
        "client_bound": found.client_bound,
        **dataclasses.asdict(found),
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / "saturation.json").write_text(json.dumps(document, indent=1) + "\n")
    table = _markdown(document, found, checks)
    (results / "saturation.md").write_text(table)
    out.print(table)
    if found.client_bound:
        fail("client-bound: the load generator was too busy, or sent too late", code=3)
    if not all(check.passed for check in checks):
        fail("a check failed")


def _markdown(document: dict[str, Any], found: Saturation, checks: list[Check]) -> str:
    machine, overload = document["machine"], found.overload
    first = overload.ttft_ms
    lines = [
        f"# Saturation, {document['date']}",
        "",
        f"{machine['cpu']}, torch {machine['torch']}, Python {machine['python']}; the load "
        f"generator's machine. {found.server}. Open loop, Poisson arrivals; times count from the "
        "arrival.",
        "",
        "Not asked of the server but taken from the command line: a queue of "
        f"{document['max_waiting_on_command_line']}, and the settings "
        f"`{json.dumps(document['settings_on_command_line'])}`.",
        "",
        f"`{document['command']}`",
        "",
        f"Sustained: {found.sustained.served_per_s:.2f} requests/s. Offered: "
        f"{found.overloaded.load:.2f} requests/s, {overload.requests} in all. Of those admitted, "
        f"the first token took {'-' if first is None else f'{first.p50:.0f}'} ms at the median.",
        "",
        "| check | found | |",
        "|---|---|---|",
        *(f"| {c.name} | {c.found} | {'passed' if c.passed else 'FAILED'} |" for c in checks),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
