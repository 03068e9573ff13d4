"""What is measured stays: the folder of a sweep across interruptions."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from loadtests.summary import summarize
from loadtests.sweep import results as results_module
from loadtests.sweep.conditions import fingerprint
from loadtests.sweep.counters import Counters
from loadtests.sweep.measure import Measurement
from loadtests.sweep.results import Results, new_results, read_results
from loadtests.sweep.runner import missing_jobs
from loadtests.sweep.source import SweepError
from tests.loadtests.sweep.documents import LIMITS, SWEEP, plan

_SUMMARY = summarize([], client_cpu=0.2, began=0.0)
MEASURED = Measurement(_SUMMARY, Counters(), server_cores=1.0, seconds=2.0)


@pytest.fixture(autouse=True)
def _no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.capacity import MachineLimits

    monkeypatch.setattr(
        results_module, "measure_machine", lambda _: MachineLimits.from_dict(LIMITS)
    )


def opened(directory: Path, text: str = SWEEP, *, fresh: bool = False) -> Results:
    """As the command does it."""
    found = None if fresh else read_results(directory, plan(text))
    return found or new_results(directory, plan(text), "headroom sweep sweep.yaml", fresh=fresh)


def measure_first(results: Results, measured: Measurement = MEASURED) -> None:
    job = missing_jobs(plan(), results)[0]  # which is another one each time
    samples = results.samples_file(job.configuration.name, job.load, job.repeat)
    samples.write_bytes(b"lines")
    results.add(job.configuration.name, job.load, job.repeat, measured)


def test_runs_are_interleaved_and_a_measured_one_is_not_repeated(tmp_path: Path) -> None:
    results = opened(tmp_path / "sweep")
    jobs = missing_jobs(plan(), results)
    assert len(jobs) == 3 * 4 * 3
    assert [job.configuration.name for job in jobs[:4]] == [
        "h4kv4d16", "h4kv2d16", "h4kv1d16", "h4kv4d16",
    ]  # fmt: skip
    measure_first(results)
    again = opened(tmp_path / "sweep")
    assert missing_jobs(plan(), again) == jobs[1:]
    assert again.document == json.loads(json.dumps(results.document))


def test_a_run_without_its_samples_is_measured_again_and_kept_once(tmp_path: Path) -> None:
    results = opened(tmp_path / "sweep")
    measure_first(results)
    next((tmp_path / "sweep" / "samples").iterdir()).unlink()
    again = opened(tmp_path / "sweep")
    assert len(missing_jobs(plan(), again)) == 36
    measure_first(again)
    assert len(again.runs) == 1


def test_a_run_that_was_not_counted_is_measured_again(tmp_path: Path) -> None:
    results = opened(tmp_path / "sweep")
    busy = dataclasses.replace(_SUMMARY, client_bound=True)
    measure_first(results, dataclasses.replace(MEASURED, summary=busy))
    again = opened(tmp_path / "sweep")
    assert len(missing_jobs(plan(), again)) == 36
    measure_first(again)
    assert len(missing_jobs(plan(), again)) == 35
    assert len(again.runs) == 1


def test_every_run_has_its_commit_and_the_document_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit in ("first", "second"):
        monkeypatch.setattr(results_module, "commit", lambda commit=commit: commit)
        results = opened(tmp_path / "sweep")
        measure_first(results)
    assert [run["commit"] for run in results.runs] == ["first", "second"]
    assert results.document["commit"] == "first, second"


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("versions", "torch", "1.0"),
        ("machine", "cpu", "1 x Abacus"),
        ("machine", "threads", 77),
        ("checkpoints", "demo", "0" * 64),
    ],
)
def test_runs_are_not_added_to_those_of_other_conditions(
    section: str, name: str, value: object, tmp_path: Path
) -> None:
    demo = SWEEP.replace("loads:", "  - name: demo\n    checkpoint: demo\nloads:")
    results = opened(tmp_path / "sweep", demo)
    opened(tmp_path / "sweep", demo).go_on(plan(demo))
    results.document[section][name] = value
    results.save()
    again = opened(tmp_path / "sweep", demo)  # which is all that an analysis needs
    with pytest.raises(SweepError, match=rf"{section}\.{name} was '?{value}'?, is "):
        again.go_on(plan(demo))


def test_a_fingerprint_follows_the_content(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("other words")
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("other weights")
    assert fingerprint(tmp_path) != before


def test_older_files_name_the_commit_once_and_no_checkpoints(tmp_path: Path) -> None:
    results = opened(tmp_path / "sweep")
    measure_first(results)
    results.document["commit"] = "old"
    del results.runs[0]["commit"], results.document["checkpoints"]
    results.save()
    again = opened(tmp_path / "sweep")
    assert [run["commit"] for run in again.runs] == ["old"]
    again.go_on(plan())
    assert len(missing_jobs(plan(), again)) == 35


def test_all_cores_are_those_of_the_machine_that_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path / "sweep")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(77))
    again = opened(tmp_path / "sweep")
    with pytest.raises(SweepError, match=r"machine\.threads was \d+, is 77"):
        again.go_on(plan())
    with pytest.raises(SweepError, match="differs in engine"):
        opened(tmp_path / "sweep", SWEEP.replace("64MiB", "64MiB\n  num_threads: 77"))


def test_another_sweep_is_refused_until_the_old_one_may_go(tmp_path: Path) -> None:
    measure_first(opened(tmp_path / "sweep"))
    changed = SWEEP.replace("repeats: 3", "repeats: 4").replace("output: 8", "output: 9")
    with pytest.raises(SweepError, match=r"differs in repeats, .*loads"):
        opened(tmp_path / "sweep", changed)
    assert opened(tmp_path / "sweep", changed, fresh=True).runs == []
    assert list((tmp_path / "sweep" / "samples").iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(SweepError, match="holds files of something else"):
            opened(tmp_path, fresh=fresh)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(SweepError, match="is no result of a sweep"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        (
            {"client_bound": True, "client_cpu": 0.97},
            "the load generator was busy (0.97 of one core)",
        ),
        ({"failures": {"UNAVAILABLE": 2}}, "requests failed: 2 UNAVAILABLE"),
        (
            {"prompt_tokens": 12, "output_tokens": 5},
            "the server counted 0 prompt and 0 output tokens, the clients 12 and 5",
        ),
    ],
)
def test_what_says_nothing_about_the_server_is_not_counted(
    changes: dict[str, object], reason: str | None
) -> None:
    summary = dataclasses.replace(_SUMMARY, **changes)  # type: ignore[arg-type]
    assert dataclasses.replace(MEASURED, summary=summary).to_dict()["why_not_counted"] == reason
