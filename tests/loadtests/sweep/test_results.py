"""What is measured stays: the folder of a sweep across interruptions."""

import dataclasses
import json
from pathlib import Path

import pytest

from loadtests.summary import summarize
from loadtests.sweep.counters import Counters
from loadtests.sweep.measure import Measurement
from loadtests.sweep.results import Results, open_results
from loadtests.sweep.runner import missing_jobs
from loadtests.sweep.source import SweepError
from tests.loadtests.sweep.documents import LIMITS, SWEEP, plan

_SUMMARY = summarize([], client_cpu=0.2, began=0.0)
MEASURED = Measurement(_SUMMARY, Counters(), server_cores=1.0, seconds=2.0)


@pytest.fixture(autouse=True)
def _no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    from loadtests.sweep import results
    from service.capacity import MachineLimits

    monkeypatch.setattr(results, "measure_machine", lambda _: MachineLimits.from_dict(LIMITS))


def opened(directory: Path, text: str = SWEEP, *, fresh: bool = False) -> Results:
    return open_results(directory, plan(text), "headroom sweep sweep.yaml", fresh=fresh)


def measure_first(results: Results) -> None:
    job = missing_jobs(plan(), results)[0]
    samples = results.samples_file(job.configuration.name, job.load, job.repeat)
    samples.write_bytes(b"lines")
    results.add(job.configuration.name, job.load, job.repeat, MEASURED)


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
    ],
)
def test_what_says_nothing_about_the_server_is_not_counted(
    changes: dict[str, object], reason: str | None
) -> None:
    summary = dataclasses.replace(_SUMMARY, **changes)  # type: ignore[arg-type]
    assert dataclasses.replace(MEASURED, summary=summary).to_dict()["why_not_counted"] == reason
