"""`headroom sweep`: read, check, measure what is missing, report."""

import json
import re
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
    from loadtests.sweep.source import Source

# What the extra `loadtests` installs.
_NEEDED = ("jinja2", "locust", "plotly", "psutil")
_QUICK = Path(__file__).parent.parent / "sweeps" / "quick.yaml"
# What flags say of a sweep beside its models, if they say nothing else.
_DEFAULTS: dict[str, Any] = {
    "name": "flags", "clients": "1,8,32", "prompt": "128", "output": 128, "kv_cache": "1GiB",
    "repeats": 3,
}  # fmt: skip


def sweep(
    file: Annotated[
        Path | None, typer.Argument(help="YAML file, as docs/sweep.md describes.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models, some two minutes.")] = False,
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
    clients: Annotated[str | None, typer.Option(help="Streams at once. [default: 1,8,32]")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt tokens. [default: 128]")] = None,
    output: Annotated[int | None, typer.Option(help="Output tokens. [default: 128]")] = None,
    kv_cache: Annotated[str | None, typer.Option(help="KV budget. [default: 1GiB]")] = None,
    repeats: Annotated[int | None, typer.Option(help="Runs of a point. [default: 3]")] = None,
    name: Annotated[
        str | None, typer.Option(help="Folder of the results. [default: flags]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Measure head configurations under load and write a report.

    A FILE says everything; without one, flags describe the models and the loads. An interrupted
    sweep goes on when the same command runs again.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        fail(f"{', '.join(missing)} not installed; pip install 'headroom[loadtests]'", code=2)
    from loadtests.run import LoadError
    from loadtests.servers import ServerError
    from loadtests.sweep.reading import read_plan
    from loadtests.sweep.source import SweepError, parse_source, read_source

    shape = {
        "heads": _numbers(heads), "kv_heads": _numbers(kv_heads), "head_dim": _numbers(head_dim),
        "window": _numbers(window), "layers": layers, "hidden": hidden,
        "intermediate": intermediate, "dtype": dtype,
    }  # fmt: skip
    model = _given(shape)
    rest = _given(
        {
            "name": name, "clients": clients, "prompt": prompt, "output": output,
            "kv_cache": kv_cache, "repeats": repeats,
        }
    )  # fmt: skip
    if (file is not None) + quick + bool(model) != 1:
        fail("give a FILE, or --quick, or --heads and other flags of a model", code=2)
    if rest and not model:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in rest)
        fail(f"{flags}: allowed beside --heads and other flags of a model, not a file", code=2)
    try:
        if model:
            source = parse_source(json.dumps(_described(model, _DEFAULTS | rest)), "")
        else:
            source = read_source(file or _QUICK)
        plan = read_plan(source, Path(source.name).stem)
        directory = results / plan.name
        document = _measure(plan, source, directory, fresh=fresh)
    except SweepError as error:
        fail(_in_flags(str(error)) if model else str(error), code=2)
    except (ServerError, LoadError, OSError) as error:
        lines = str(error).splitlines() or [repr(error)]  # of a program that failed: its last
        text = " ".join(dict.fromkeys((lines[0], lines[-1])))
        fail(f"{text}; the same command goes on from here")
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here", code=130)
    if as_json:
        print(json.dumps(document))
    else:
        out.print((directory / "report.md").read_text(encoding="utf-8"), end="")
        out.print(f"\nreport  {directory / 'report.html'}")


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _described(model: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """What a file would say instead of the flags."""
    load = {
        "clients": _numbers(rest["clients"]),
        "prompt": _numbers(rest["prompt"]),
        "output": rest["output"],
    }
    return {
        "name": rest["name"],
        "engine": {"kv_cache_bytes": rest["kv_cache"]},
        "repeats": rest["repeats"],
        "configurations": [model],
        "loads": [load],
    }


def _measure(plan: "Plan", source: "Source", directory: Path, *, fresh: bool) -> dict[str, Any]:
    from loadtests.sweep.analysis import analyse
    from loadtests.sweep.checks import check_machine
    from loadtests.sweep.quality import measure_quality
    from loadtests.sweep.report import write_report
    from loadtests.sweep.results import new_results, read_results
    from loadtests.sweep.runner import missing_jobs, run_jobs, unmeasured_checkpoints
    from loadtests.sweep.watcher import ConsoleWatcher

    # Whoever ends this process ends the servers that it has started. Python leaves SIGINT ignored
    # where a shell has started it in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    found = None if fresh else read_results(directory, plan)
    jobs = missing_jobs(plan, found)
    unmeasured = unmeasured_checkpoints(plan, found)
    if jobs:
        check_machine(plan, source)
    if found is None:
        command = shlex.join(["headroom", *sys.argv[1:]])
        found = new_results(directory, plan, command, fresh=fresh)
    elif jobs or unmeasured:
        found.go_on(plan)
    total = len(plan.configurations) * len(plan.loads) * plan.repeats
    err.print(
        f"{len(plan.configurations)} configurations, {len(plan.loads)} loads, "
        f"{plan.repeats} repeats: {total} runs, {total - len(jobs)} of them measured already; "
        f"{sum(job.load.num_requests for job in jobs):,} requests"
    )
    measure_quality(unmeasured, plan.text, found, err)
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
    return [None if part == "all" else _number(part) for part in parts]


def _number(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _in_flags(mistakes: str) -> str:
    """Mistakes of what a file would say, as those of flags."""
    named = mistakes.replace("engine.kv_cache_bytes ", "--kv-cache ")
    section = r"^(?:(?:configurations|loads)\[0\]\.)?"
    return re.sub(
        rf"{section}(?!configurations|loads)(\w+)(?:\[\d+\])?(?= is | needs )",
        _flag,
        named,
        flags=re.MULTILINE,
    )


def _flag(match: re.Match[str]) -> str:
    return f"--{match[1].replace('_', '-')}"
