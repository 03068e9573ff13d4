"""Environments are made once, and what fails says where to read why."""

from pathlib import Path

import pytest

from loadtests.peers.environments import Environment, Peer, PeerError, prepare


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the environment is, which takes seconds to make."""
    return tmp_path_factory.mktemp("peers")


def test_a_converter_that_fails_names_its_log(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    peer = Peer(
        "other",
        "none.py",
        Environment("empty", []),
        converter=["python", "-c", "import sys; sys.exit('no such layer')", "{checkpoint}"],
    )
    with pytest.raises(PeerError, match=r"python ended with 1: no such layer \(all of it: .*log\)"):
        prepare(peer, tmp_path / "checkpoint", cache)
    assert not (tmp_path / "checkpoint-other").exists()


def test_environment_and_checkpoint_are_made_once(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    peer = Peer(
        "other",
        "none.py",
        Environment("empty", []),
        converter=["python", "-c", "import os, sys; os.mkdir(sys.argv[1])", "{prepared}"],
    )
    made = prepare(peer, tmp_path / "checkpoint", cache)
    assert made.is_dir()
    before = (cache / "empty" / "bin" / "python").lstat().st_mtime_ns, made.stat().st_mtime_ns
    assert prepare(peer, tmp_path / "checkpoint", cache) == made
    after = (cache / "empty" / "bin" / "python").lstat().st_mtime_ns, made.stat().st_mtime_ns
    assert before == after
