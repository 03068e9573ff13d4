"""A very small sweep with real servers and real load, by the command line."""

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from loadtests.run import LoadError
from loadtests.sweep import runner
from service.cli import app
from tests.integration.processes import Process
from tests.loadtests.sweep.browser import open_page

_CLI = [sys.executable, "-c", "from service.cli import app; app()"]
SWEEP = """\
runtime: standalone
repeats: 1
engine:
  kv_cache_bytes: 4MiB
configurations:
  - layers: 1
    hidden: 32
    intermediate: 32
    vocab: 300
    dtype: float32
    heads: 4
    head_dim: 8
    kv_heads: 4
  - layers: 1
    hidden: 32
    intermediate: 32
    vocab: 300
    dtype: float32
    heads: 4
    head_dim: 8
    kv_heads: 1
    window: 8
loads:
  - clients: 2
    prompt: 12
    output: 5
    waves: 2
"""


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_CLI, "sweep", *arguments, "--results", str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
    )


def _check_run(run: dict[str, Any], folder: Path) -> None:
    """Clients, samples and server tell the same."""
    assert run["why_not_counted"] is None
    assert run["summary"]["finish_reasons"] == {"length": 4}
    with gzip.open(folder / run["samples"], "rt") as file:
        samples = [json.loads(line) for line in file]
    assert [sample["output_tokens"] for sample in samples] == [5] * 4
    assert run["server"]["generation_tokens"] == run["summary"]["output_tokens"] == 20
    assert run["server"]["prompt_tokens"] == run["summary"]["prompt_tokens"] == 48
    assert run["server"]["decode_steps"] > 0
    # The first token of each request comes from the step that computes its prompt.
    assert run["server"]["decode_sequences"] <= 16


def interrupted(tmp_path: Path, number: int, *, after: str) -> Path:
    """The file of a sweep that got a signal, and has ended what it had started."""
    file = tmp_path / "tiny.yaml"
    file.write_text(SWEEP)
    arguments = (*_CLI, "sweep", str(file), "--results", str(tmp_path))
    # As a shell without job control starts what is in the background.
    shell = ("-c", 'trap "" INT; exec "$@"', "sh", *arguments)
    with Process(*shell, program=Path("/bin/sh")) as process:
        process.wait_for(lambda line: line.startswith(after))
        family = process.family()
        process.signal(number)
        assert process.wait(30) == 130
        assert process.lines[-1] == "error: interrupted; the same command goes on from here"
    assert len(family) >= 2
    assert psutil.wait_procs(family, timeout=10)[1] == []
    return file


@pytest.mark.slow
def test_a_sweep_that_warms_up_ends_its_servers(tmp_path: Path) -> None:
    interrupted(tmp_path, signal.SIGTERM, after="warming ")


def test_an_interrupted_sweep_goes_on_to_the_report(tmp_path: Path) -> None:
    file = interrupted(tmp_path, signal.SIGINT, after="1/2 ")  # which the shell ignores
    folder = tmp_path / "tiny"
    (first,) = json.loads((folder / "sweep.json").read_text())["runs"]
    (samples,) = (folder / "samples").iterdir()
    assert samples == folder / first["samples"]
    written = samples.stat().st_mtime_ns

    answer = sweep(tmp_path, str(file), "--json")
    assert answer.returncode == 0, answer.stderr
    assert "2 configurations, 1 loads, 1 repeats: 2 runs, 1 of them measured" in answer.stderr
    assert "1 runs will take about" in answer.stderr
    document = json.loads((folder / "sweep.json").read_text())
    assert json.loads(answer.stdout) == document
    assert document["runs"][0] == first
    assert samples.stat().st_mtime_ns == written
    for run in document["runs"]:
        _check_run(run, folder)
    windowed = document["points"][1]["decode"]
    # Float32 keys and values of one head of width 8, at most 8 tokens of 2 sequences.
    assert 0 < windowed["kv_bytes"] <= 2 * 8 * 2 * 8 * 4
    dom, console = open_page(folder / "report.html", tmp_path / "profile")
    assert console == []
    assert "h4kv1d8w8" in dom

    before = {path: path.stat().st_mtime_ns for path in (folder / "samples").iterdir()}
    again = CliRunner().invoke(app, ["sweep", str(file), "--results", str(tmp_path)])
    assert again.exit_code == 0, again.stderr
    assert "2 runs, 2 of them measured already" in again.stderr
    assert again.stdout.startswith("# tiny, ")
    assert {path: path.stat().st_mtime_ns for path in (folder / "samples").iterdir()} == before


def test_a_load_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_jobs(*_: object) -> None:
        raise LoadError("locust ended with code 1:\nTraceback\nImportError: no gevent")

    monkeypatch.setattr(runner, "run_jobs", run_jobs)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is not a sweep's own
    file = tmp_path / "tiny.yaml"
    file.write_text(SWEEP)
    answer = CliRunner().invoke(app, ["sweep", str(file), "--results", str(tmp_path)])
    assert answer.exit_code == 1
    assert answer.stderr.splitlines()[1:] == [
        "error: locust ended with code 1: ImportError: no gevent; the same command goes on from "
        "here"
    ]


def test_flags_name_their_folder(tmp_path: Path) -> None:
    """A folder of something else shows it before anything is measured."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    arguments = ("--heads", "12", "--clients", "1", "--kv-cache", "64MiB", "--name", "mine")
    answer = CliRunner().invoke(app, ["sweep", *arguments, "--results", str(tmp_path)])
    assert (answer.exit_code, answer.stderr) == (
        2, f"error: {tmp_path / 'mine'} holds files of something else; name the sweep otherwise\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--quick", "--clients", "4", "--prompt", "8", "--output", "8", "--kv-cache", "1GiB",
          "--repeats", "1", "--name", "fast"),
         "error: --name, --clients, --prompt, --output, --kv-cache, --repeats: allowed beside "
         "--heads and other flags of a model, not a file\n"),
        (("sweep.yaml", "--repeats", "1"),
         "error: --repeats: allowed beside --heads and other flags of a model, not a file\n"),
        (("--heads", "12", "--name", "two words"),
         "error: --name is 'two words'; allowed: match pattern '^[a-zA-Z0-9_-]{1,64}$'\n"),
        (("--quick", "--heads", "4"),
         "error: give a FILE, or --quick, or --heads and other flags of a model\n"),
        (("--heads", "12", "--kv-heads", "12,5", "--clients", "none"),
         "error: --kv-heads is 5; allowed: a divisor of heads=12\n"
         "error: --clients is 'none'; allowed: a valid integer\n"),
        (("--heads", "12,12", "--clients", "8,-3"),
         "error: configurations[0] is another 'h12kv12d64'; allowed: names that differ\n"
         "error: --clients is -3; allowed: greater than or equal to 1\n"),
        (("--heads", "12", "--kv-cache", "1MiB", "--clients", "1"),
         "error: --kv-cache is 1048576, which holds 0 sequences of load c1-p128-o128 in "
         "configuration h12kv12d64; needed: 1\n"),
    ],
)  # fmt: skip
def test_bad_usage_ends_with_2_before_anything_starts(
    arguments: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    results = str(tmp_path / "results")
    answer = CliRunner().invoke(app, ["sweep", *arguments, "--results", results])
    assert (answer.exit_code, answer.stderr) == (2, expected)
    assert not (tmp_path / "results").exists()
