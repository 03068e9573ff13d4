"""Every command that README and tutorial show is run, against a real server."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.runtimes.ray_environment import free_ports
from tests.integration.processes import Process

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/tutorial.md")
_CLI = ("-c", "from service.cli import app; app()")


def _blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page, block)
        for page in PAGES
        for block in re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    ]


def _commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for _, b in _blocks("sh") for line in b.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """The demo model on a free port."""
    port, metrics_port = free_ports(2)
    ports = ["--port", str(port), "--metrics-port", str(metrics_port)]
    with Process(*_CLI, "serve", "--runtime", "standalone", *ports) as server:
        server.wait_for(lambda line: line.startswith("ready"))
        yield f"127.0.0.1:{port}"


@pytest.mark.parametrize("command", [c for c in _commands() if c.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    subprocess.run(["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, check=True)


def test_make_serve_runs_the_command_that_is_tested_elsewhere() -> None:
    recipe = subprocess.run(
        ["make", "--dry-run", "serve"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert ".venv/bin/headroom serve" in recipe.stdout.splitlines()


@pytest.mark.parametrize("command", [c for c in _commands() if c.startswith(".venv/bin/headroom")])
def test_commands_do_what_they_say(command: str, target: str, tmp_path: Path) -> None:
    arguments = shlex.split(command)[1:]
    if arguments[0] in ("serve", "sweep"):
        assert _help_knows(arguments), command
        return
    if arguments[0] in ("generate", "model"):
        arguments += ["--target", target]
    if arguments[0] in ("convert", "prune"):
        arguments += ["--calibration-tokens", "2048"]  # shown with the default, ten times as long
    answer = subprocess.run(
        [sys.executable, *_CLI, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    wrong_on_purpose = "--temperature 200" in command
    assert answer.returncode == (1 if wrong_on_purpose else 0), answer.stderr
    if wrong_on_purpose:
        promised = "error: INVALID_ARGUMENT: sampling.temperature is 200; allowed: 0 to 100"
        assert answer.stderr.strip() == promised
        assert promised in (ROOT / "docs/tutorial.md").read_text()
    else:
        assert answer.stdout.strip()


def _help_knows(arguments: list[str]) -> bool:
    """What takes long or needs a model of the reader's is not started; its options are real."""
    answer = subprocess.run(
        [sys.executable, *_CLI, arguments[0], "--help"], capture_output=True, text=True, cwd=ROOT
    )
    return all(option in answer.stdout for option in arguments if option.startswith("--"))


@pytest.mark.parametrize(("page", "block"), _blocks("python"))
def test_python_examples_run(page: str, block: str, target: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", block.replace("127.0.0.1:9000", target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()


def test_links_lead_somewhere() -> None:
    pages = [*map(ROOT.joinpath, PAGES), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
