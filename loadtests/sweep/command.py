"""`headroom sweep`: read, check, measure what is missing, report."""

import json
import shlex
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.console import err, fail, out

if TYPE_CHECKING:
    from loadtests.sweep.plan import Plan

# What the extra `loadtests` installs.
_NEEDED = ("jinja2", "locust", "plotly", "psutil")
_QUICK = Path(__file__).parent.parent / "sweeps" / "quick.yaml"


def sweep(
    file: Annotated[
        Path | None, typer.Argument(help="YAML file, as docs/sweep.md describes.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models, under 3 minutes.")] = False,
    results: Annotated[
        Path, typer.Option(help="Folder in which the sweep gets one of its own.")
    ] = Path("loadtests/results"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what is measured already.")
    ] = False,
    heads: Annotated[str | None, typer.Option(help="Query heads, as 12 or 4,8,12.")] = None,
    kv_heads: Annotated[str | None, typer.Option(help="Key/value heads, as 12,4,1.")] = None,
    head_dim: Annotated[str | None, typer.Option(help="Width of a head.")] = None,
    window: Annotated[str | None, typer.Option(help="Tokens seen, as all,128.")] = None,
    layers: Annotated[int | None, typer.Option(help="[default: 12]")] = None,
    hidden: Annotated[int | None, typer.Option(help="[default: 768]")] = None,
    intermediate: Annotated[int | None, typer.Option(help="[default: 2048]")] = None,
    dtype: Annotated[str | None, typer.Option(help="[default: bfloat16]")] = None,
    clients: Annotated[str, typer.Option(help="Streams at once, without a file.")] = "1,8,32",
    prompt: Annotated[str, typer.Option(help="Prompt tokens, without a file.")] = "128",
    output: Annotated[int, typer.Option(help="Output tokens, without a file.")] = 128,
    kv_cache: Annotated[str, typer.Option(help="KV budget, without a file.")] = "1GiB",
    repeats: Annotated[int, typer.Option(help="Runs of a point, without a file.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Measure head configurations under load and write a report.

    An interrupted sweep goes on when the same command runs again.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        fail(f"{', '.join(missing)} not installed; pip install 'headroom[loadtests]'", code=2)
    from loadtests.servers import ServerError
    from loadtests.sweep.reading import read_plan
    from loadtests.sweep.source import SweepError, parse_source, read_source

    shape = {
        "heads": _numbers(heads), "kv_heads": _numbers(kv_heads), "head_dim": _numbers(head_dim),
        "window": _numbers(window), "layers": layers, "hidden": hidden,
        "intermediate": intermediate, "dtype": dtype,
    }  # fmt: skip
    given = {name: value for name, value in shape.items() if value is not None}
    if (file is not None) + quick + bool(given) != 1:
        fail("give a FILE, or --quick, or --heads and other flags of a model", code=2)
    try:
        if given:
            described = {
                "engine": {"kv_cache_bytes": kv_cache},
                "repeats": repeats,
                "configurations": [given],
                "loads": [
                    {"clients": _numbers(clients), "prompt": _numbers(prompt), "output": output}
                ],
            }
            plan = read_plan(parse_source(json.dumps(described), ""), "flags")
        else:
            source = file or _QUICK
            plan = read_plan(read_source(source), source.stem)
        directory = results / plan.name
        document = _measure(plan, directory, fresh=fresh)
    except SweepError as error:
        fail(str(error), code=2)
    except (ServerError, OSError) as error:
        fail(f"{error}; the same command goes on from here")
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here", code=130)
    if as_json:
        print(json.dumps(document))
    else:
        out.print((directory / "report.md").read_text(encoding="utf-8"), end="")
        out.print(f"\nreport  {directory / 'report.html'}")


def _measure(plan: "Plan", directory: Path, *, fresh: bool) -> dict[str, Any]:
    from loadtests.sweep.analysis import analyse
    from loadtests.sweep.report import write_report
    from loadtests.sweep.results import open_results
    from loadtests.sweep.runner import missing_jobs, run_jobs
    from loadtests.sweep.watcher import ConsoleWatcher

    # Whoever ends this process ends the servers that it has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = shlex.join(["headroom", *sys.argv[1:]])
    found = open_results(directory, plan, command, fresh=fresh)
    jobs = missing_jobs(plan, found)
    total = len(plan.configurations) * len(plan.loads) * plan.repeats
    err.print(
        f"{len(plan.configurations)} configurations, {len(plan.loads)} loads, "
        f"{plan.repeats} repeats: {total} runs, {total - len(jobs)} of them measured already; "
        f"{sum(job.load.num_requests for job in jobs):,} requests"
    )
    if jobs:
        with ConsoleWatcher(err, len(jobs)) as watcher:
            run_jobs(plan, jobs, found, watcher)
    found.document = analyse(plan, found.document)
    found.save()
    write_report(found.document, directory)
    return found.document


def _numbers(text: str | None) -> list[int | str | None] | None:
    """`all,128` to null and 128; what is no number stays, to be refused by its name."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    return [None if p == "all" else int(p) if p.isdecimal() else p for p in parts]
