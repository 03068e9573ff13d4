"""The folder of a sweep: what is measured stays, so that an interrupted sweep goes on."""

import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from loadtests.sweep.conditions import commit, conditions, differences
from loadtests.sweep.measure import Measurement
from loadtests.sweep.plan import Load, Plan
from loadtests.sweep.source import SweepError
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
        self._commit = commit()

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.document["runs"]  # type: ignore[no-any-return]

    def samples_file(self, configuration: str, load: Load, repeat: int) -> Path:
        name = f"{configuration}.{load.name}.{repeat}.jsonl.gz"
        return self.directory / "samples" / name

    def has(self, configuration: str, load: Load, repeat: int) -> bool:
        """Whether a run is measured: its summary and its samples are there, and it counts."""
        key = {"configuration": configuration, "load": load.name, "repeat": repeat}
        counted = key | {"why_not_counted": None}
        return self.samples_file(configuration, load, repeat).exists() and any(
            counted.items() <= run.items() for run in self.runs
        )

    def add(self, configuration: str, load: Load, repeat: int, measured: Measurement) -> None:
        """Keep a run, in place of an earlier one whose samples are gone or that did not count.

        `commit` of the document names those of all its runs.
        """
        key = {"configuration": configuration, "load": load.name, "repeat": repeat}
        self.document["runs"] = [run for run in self.runs if not key.items() <= run.items()]
        samples = self.samples_file(configuration, load, repeat).relative_to(self.directory)
        found = {"samples": str(samples), "commit": self._commit}
        self.runs.append(key | measured.to_dict() | found)
        commits = dict.fromkeys(run["commit"] for run in self.runs if run["commit"])
        self.document["commit"] = ", ".join(commits) or None
        self.save()

    def add_quality(self, configuration: str, measured: dict[str, Any]) -> None:
        """Keep what a checkpoint loses."""
        self.document["quality"][configuration] = measured
        self.save()

    def save(self) -> None:
        """Write sweep.json; a crash leaves the old one or the new one."""
        text = json.dumps(self.document, indent=1) + "\n"
        partial = self.directory / f"{_FILE}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.directory / _FILE)

    def go_on(self, plan: Plan) -> None:
        """Allow runs beside those that are there.

        Raises:
            SweepError: those were measured elsewhere, or with something else.
        """
        now = conditions(plan)
        different = differences(self.document, now)
        if different:
            raise SweepError(
                "\n".join(different) + f"\n{self.directory} lacks runs, and new ones could not be "
                "compared with the old ones; name this sweep otherwise, or let --fresh delete them"
            )
        self.document.setdefault("text", now["text"])
        (self.directory / "samples").mkdir(exist_ok=True)


def read_results(directory: Path, plan: Plan) -> Results | None:
    """What a folder holds of a plan; None if nothing is there.

    Raises:
        SweepError: the folder holds another sweep.
    """
    file = directory / _FILE
    if not file.exists():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        stored = document["spec"]
        document.setdefault("quality", {})
        for one in stored["configurations"]:
            one.pop("quality", None)  # older files have there what a model card says
        spec = _comparable(plan, stored)
        same = document["format"] == FORMAT and stored == spec
        for run in document["runs"]:
            run.setdefault("commit", document["commit"])  # older files name it once for all
    except (ValueError, KeyError, TypeError) as error:
        raise SweepError(f"{file} is no result of a sweep: {error!r}") from error
    if not same:
        changed = [key for key, value in spec.items() if stored.get(key) != value]
        raise SweepError(
            f"{directory} holds a sweep that differs in {', '.join(changed) or 'its format'}; "
            "give this one another name (`name` in its file, or --name), or let --fresh delete "
            "that one"
        )
    return Results(directory, document)


def new_results(directory: Path, plan: Plan, command: str, *, fresh: bool) -> Results:
    """A folder for a plan.

    Args:
        fresh: whether an earlier sweep in it may be deleted.

    Raises:
        SweepError: the folder holds something else.
    """
    if fresh:
        shutil.rmtree(directory / "samples", ignore_errors=True)
        for name in _WRITTEN:
            (directory / name).unlink(missing_ok=True)
    if directory.exists() and any(directory.iterdir()):
        raise SweepError(f"{directory} holds files of something else; name the sweep otherwise")
    # What the machine can do is measured as an engine uses it.
    torch.set_num_threads(plan.engine.num_threads or torch.get_num_threads())
    document: dict[str, Any] = {
        "format": FORMAT,
        "name": plan.name,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "commit": commit(),
        **conditions(plan),
        "limits": measure_machine(torch.device("cpu")).to_dict(),
        "spec": plan.spec(),
        "quality": {},
        "runs": [],
    }
    results = Results(directory, document)
    (directory / "samples").mkdir(parents=True, exist_ok=True)
    results.save()
    return results


def _comparable(plan: Plan, stored: dict[str, Any]) -> dict[str, Any]:
    """The plan's spec as it reads back. "All cores" are those of the machine that measured."""
    spec: dict[str, Any] = json.loads(json.dumps(plan.spec()))
    if plan.all_cores:
        spec["engine"]["num_threads"] = stored["engine"]["num_threads"]
    return spec
