"""A very small sweep with real servers and real load, by the command line."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_a_sweep_from_the_file_to_the_report(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(SWEEP)
    answer = sweep(tmp_path, str(file), "--json")
    assert answer.returncode == 0, answer.stderr
    assert "2 configurations, 1 loads, 1 repeats: 2 runs, 0 of them measured" in answer.stderr
    assert "2 runs will take about" in answer.stderr
    folder = tmp_path / "tiny"
    document = json.loads((folder / "sweep.json").read_text())
    assert json.loads(answer.stdout) == document
    for run in document["runs"]:
        _check_run(run, folder)
    windowed = document["points"][1]["decode"]
    # Float32 keys and values of one head of width 8, at most 8 tokens of 2 sequences.
    assert 0 < windowed["kv_bytes"] <= 2 * 8 * 2 * 8 * 4
    dom, console = open_page(folder / "report.html", tmp_path / "profile")
    assert console == []
    assert "h4kv1d8w8" in dom

    written = {path: path.stat().st_mtime_ns for path in (folder / "samples").iterdir()}
    again = sweep(tmp_path, str(file))
    assert again.returncode == 0, again.stderr
    assert "2 runs, 2 of them measured already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "samples").iterdir()} == written
    assert again.stdout.startswith("# tiny, ")


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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--quick", "--heads", "4"),
         "error: give a FILE, or --quick, or --heads and other flags of a model\n"),
        (("--heads", "12", "--kv-heads", "12,5", "--clients", "none"),
         "error: configurations[0].kv_heads is 5; allowed: a divisor of heads=12\n"
         "error: loads[0].clients[0] is 'none'; allowed: a valid integer\n"),
    ],
)  # fmt: skip
def test_bad_usage_ends_with_2_before_anything_starts(
    arguments: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    answer = sweep(tmp_path / "results", *arguments)
    assert (answer.returncode, answer.stderr) == (2, expected)
    assert not (tmp_path / "results").exists()
