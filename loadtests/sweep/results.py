"""The folder of a sweep: what is measured stays, so that an interrupted sweep goes on."""

import json
import os
import platform
import shutil
import subprocess
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loadtests.sweep.measure import Measurement
from loadtests.sweep.plan import Load, Plan
from loadtests.sweep.source import SweepError
from service.bench import machine
from service.capacity.machine import measure_machine

FORMAT = 1
_FILE = "sweep.json"
_WRITTEN = (_FILE, "report.html", "report.md", "throughput.png")


class Results:
    """Runs of a sweep, in memory and in its folder.

    Attributes:
        document: what sweep.json holds; `runs` grows, the analysis is added at the end.
    """

    def __init__(self, directory: Path, document: dict[str, Any]) -> None:
        self.directory = directory
        self.document = document

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.document["runs"]  # type: ignore[no-any-return]

    def samples_file(self, configuration: str, load: Load, repeat: int) -> Path:
        name = f"{configuration}.{load.name}.{repeat}.jsonl.gz"
        return self.directory / "samples" / name

    def has(self, configuration: str, load: Load, repeat: int) -> bool:
        """Whether a run is measured: its summary and its samples are there."""
        key = (configuration, load.name, repeat)
        return self.samples_file(configuration, load, repeat).exists() and any(
            (run["configuration"], run["load"], run["repeat"]) == key for run in self.runs
        )

    def add(self, configuration: str, load: Load, repeat: int, measured: Measurement) -> None:
        """Keep a run, in place of an earlier one whose samples are gone."""
        key = {"configuration": configuration, "load": load.name, "repeat": repeat}
        self.document["runs"] = [run for run in self.runs if not key.items() <= run.items()]
        samples = self.samples_file(configuration, load, repeat).relative_to(self.directory)
        self.runs.append(key | measured.to_dict() | {"samples": str(samples)})
        self.save()

    def save(self) -> None:
        """Write sweep.json; a crash leaves the old one or the new one."""
        text = json.dumps(self.document, indent=1) + "\n"
        partial = self.directory / f"{_FILE}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.directory / _FILE)


def open_results(directory: Path, plan: Plan, command: str, *, fresh: bool) -> Results:
    """The folder of a plan: new, or the one of an earlier run of the same plan.

    Raises:
        SweepError: the folder holds something else.
    """
    file = directory / _FILE
    if fresh:
        shutil.rmtree(directory / "samples", ignore_errors=True)
        for name in _WRITTEN:
            (directory / name).unlink(missing_ok=True)
    if not file.exists():
        if directory.exists() and any(directory.iterdir()):
            raise SweepError(f"{directory} holds files of something else; name the sweep otherwise")
        results = Results(directory, _new_document(plan, command))
        (directory / "samples").mkdir(parents=True, exist_ok=True)
        results.save()
        return results
    spec = json.loads(json.dumps(plan.spec()))  # as it reads back
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        same = document["format"] == FORMAT and document["spec"] == spec
    except (ValueError, KeyError, TypeError) as error:
        raise SweepError(f"{file} is no result of a sweep: {error!r}") from error
    if not same:
        changed = [key for key, value in spec.items() if document["spec"].get(key) != value]
        raise SweepError(
            f"{directory} holds a sweep that differs in {', '.join(changed) or 'its format'}; "
            "name this one otherwise, or let --fresh delete that one"
        )
    (directory / "samples").mkdir(exist_ok=True)
    return Results(directory, document)


def _new_document(plan: Plan, command: str) -> dict[str, Any]:
    # What the machine can do is measured as an engine uses it.
    torch.set_num_threads(plan.engine.num_threads or torch.get_num_threads())
    return {
        "format": FORMAT,
        "name": plan.name,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "machine": machine(torch.device("cpu")) | {"platform": platform.platform()},
        "versions": {
            name: version(name) for name in ("headroom", "torch", "ray", "grpcio", "locust")
        }
        | {"python": platform.python_version()},
        "limits": measure_machine(torch.device("cpu")).to_dict(),
        "spec": plan.spec(),
        "runs": [],
    }


def _commit() -> str | None:
    """The commit of the code that runs, where it is a git checkout; `+` marks changes on top."""
    git = shutil.which("git")
    if git is None:
        return None
    root = Path(__file__).parents[2]

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [git, "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )

    head = ask("rev-parse", "HEAD")
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if ask("status", "--porcelain").stdout.strip() else "")
