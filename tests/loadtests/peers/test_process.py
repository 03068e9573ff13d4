"""Runners in processes of their own: asked in turn, stopped in between, never left behind."""

import time
from pathlib import Path

import psutil
import pytest

from loadtests.peers import process
from loadtests.peers.environments import Peer, PeerError
from loadtests.peers.process import running

_SCRIPT = """
import sys
sys.path.insert(0, {runners!r})
from protocol import serve

def load(settings):
    print("a library says something")
    if settings.threads == 0:
        raise RuntimeError("no threads")
    return lambda prompts, num_tokens: [prompt * num_tokens for prompt in prompts]

serve(load, "pytest")
"""


@pytest.fixture
def peer(tmp_path: Path) -> Peer:
    path = tmp_path / "runner.py"
    path.write_text(_SCRIPT.format(runners=str(Path(process.__file__).parent / "runners")))
    return Peer("other", str(path))


def _settings(**changes: object) -> dict[str, object]:
    return {
        "checkpoint": ".",
        "prepared": ".",
        "max_num_seqs": 1,
        "max_model_len": 1,
        "kv_cache_bytes": 1,
        "threads": 1,
    } | changes


def test_a_runner_answers_and_is_stopped_in_between(peer: Peer, tmp_path: Path) -> None:
    with running(peer, tmp_path, _settings()) as runner:
        assert runner.versions == {"pytest": pytest.__version__}
        answer = runner.ask([[7], [8]], 3)
        assert answer.outputs == [[7, 7, 7], [8, 8, 8]]
        assert answer.seconds > 0
        child = next(
            one for one in psutil.Process().children() if str(peer.runner) in one.cmdline()
        )
        deadline = time.monotonic() + 20
        while child.status() != psutil.STATUS_STOPPED:  # the signal is on its way
            assert time.monotonic() < deadline
        assert len(runner.ask([[7]], 1).outputs) == 1
    assert not child.is_running()
    assert "a library says something" in (tmp_path / "other.run.log").read_text()


def test_too_few_tokens_are_no_answer(peer: Peer, tmp_path: Path) -> None:
    with (
        running(peer, tmp_path, _settings()) as runner,
        pytest.raises(PeerError, match=r"other gave 1 outputs of \[4\] tokens; asked for: 1 of 2"),
    ):
        runner.ask([[1, 2]], 2)


def test_a_runner_that_cannot_load_says_why(peer: Peer, tmp_path: Path) -> None:
    with (
        pytest.raises(PeerError, match=r"other ended: RuntimeError: no threads \(all it said: "),
        running(peer, tmp_path, _settings(threads=0)),
    ):
        pass
