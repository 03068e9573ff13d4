"""Environments are made once, and what fails says where to read why."""

from pathlib import Path

import pytest

from loadtests.peers.environments import Environment, Peer, PeerError, prepare


def test_a_converter_that_fails_names_its_log(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    peer = Peer(
        "other",
        "none.py",
        Environment("empty", []),
        converter=["python", "-c", "import sys; sys.exit('no such layer')", "{checkpoint}"],
    )
    with pytest.raises(PeerError, match=r"python ended with 1: no such layer \(all of it: .*log\)"):
        prepare(peer, tmp_path / "checkpoint", tmp_path)
    assert not (tmp_path / "checkpoint-other").exists()


def test_environment_and_checkpoint_are_made_once(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    peer = Peer(
        "other",
        "none.py",
        Environment("empty", []),
        converter=["python", "-c", "import os, sys; os.mkdir(sys.argv[1])", "{prepared}"],
    )
    made = prepare(peer, tmp_path / "checkpoint", tmp_path)
    assert made.is_dir()
    before = (tmp_path / "empty" / "bin" / "python").lstat().st_mtime_ns, made.stat().st_mtime_ns
    assert prepare(peer, tmp_path / "checkpoint", tmp_path) == made
    after = (tmp_path / "empty" / "bin" / "python").lstat().st_mtime_ns, made.stat().st_mtime_ns
    assert before == after
