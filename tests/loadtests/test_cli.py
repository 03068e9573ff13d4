"""The command: what it prints, and its exit codes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests import cli
from loadtests.load import LoadSpec, LoadSummary
from loadtests.run import LoadError
from loadtests.stages import Stage
from loadtests.summary import summarize
from tests.loadtests.test_summary import SAMPLES

SERVED = [sample for sample in SAMPLES if sample.code == "OK"]
STAGES = [Stage(start=0.0, end=5.0, load=8.0)]


def run(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], answer: LoadSummary | LoadError
) -> tuple[int | str | None, list[LoadSpec]]:
    """The exit code, and what was asked of `run_load`."""
    asked: list[LoadSpec] = []

    def answer_at_once(spec: LoadSpec, *_: Any) -> LoadSummary:
        asked.append(spec)
        if isinstance(answer, LoadError):
            raise answer
        return answer

    monkeypatch.setattr(cli, "run_load", answer_at_once)
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code, asked


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        (summarize(SERVED, client_cpu=0.1, began=99.0), 0, ""),
        (
            summarize(SAMPLES, client_cpu=0.1, began=99.0),
            1,
            "error: 1 of 4 requests failed with RESOURCE_EXHAUSTED, the first with: the queue is "
            "full\n",
        ),
        (
            summarize(SERVED, client_cpu=0.95, began=99.0),
            3,
            "error: client-bound: a load process took 0.95 of a core\n",
        ),
        (LoadError("no server"), 1, "error: no server\n"),
    ],
)
def test_the_exit_code_says_what_a_run_is_worth(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: LoadSummary | LoadError,
    code: int,
    message: str,
) -> None:
    assert run(monkeypatch, ["--requests", "4"], answer)[0] == code
    assert capsys.readouterr().err == message


def test_json_is_the_summary_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = summarize(SAMPLES, client_cpu=0.95, began=99.0, stages=STAGES)
    run(monkeypatch, ["--seconds", "5", "--json"], summary)
    printed = json.loads(capsys.readouterr().out)
    assert printed == dataclasses.asdict(summary)
    assert printed["client_bound"] is True


def test_a_table_says_which_loop_it_was_and_has_a_row_per_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = summarize(SERVED, client_cpu=0.1, client_wait=0.25, began=99.0, stages=STAGES)
    arguments = ["--rate", "8", "--seconds", "5", "--shape", "ramp", "--prompt", "sharegpt"]
    _, (spec,) = run(monkeypatch, arguments, summary)
    assert spec.rate == 8
    assert str(spec.workload.prompt) == "lognormal:60,1.4,512"
    text = " ".join(capsys.readouterr().out.split())
    assert "open loop, ramp, 8 requests/s" in text
    assert "times count from the arrival" in text
    assert "TTFT 433.3 500.0 660.0 680.0 696.0 700.0" in text
    assert "0.10 of one core at its busiest, waited 0.250 s per second for a core" in text
    assert "0.0 8.0 3 0 0.40" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: requests and seconds are missing; allowed: at least one of them"),
        (["--requests", "0"], "error: num_requests is 0; allowed: 1 to 10000000"),
        (["--requests", "1", "--output", "many"], "error: length is 'many'; allowed: fixed:TOKENS"),
    ],
)
def test_wrong_usage_is_exit_code_two(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    code, asked = run(monkeypatch, arguments, LoadError("not reached"))
    assert code == 2
    assert not asked
    assert capsys.readouterr().err.startswith(message)


def test_the_module_runs_and_gives_an_example() -> None:
    command = [sys.executable, "-m", "loadtests.run", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert "Usage: python -m loadtests.run" in answer.stdout
    assert "Example: python -m loadtests.run" in answer.stdout
