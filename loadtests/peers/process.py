"""A runner in a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.peers.environments import Peer, PeerError, python_of

_RUNNERS = Path(__file__).parent / "runners"
_REPOSITORY = Path(__file__).parents[2]
_STOP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a runner took to continue all prompts, and with what."""

    seconds: float
    outputs: list[list[int]]


class Runner:
    """A loaded peer, stopped by the system whenever it is not asked: who waits must not take part
    of a core from who is measured.

    Attributes:
        seconds_to_ready: from importing its packages to the end of loading.
        versions: of its packages.
    """

    def __init__(self, peer: Peer, process: "subprocess.Popen[str]", log: Path) -> None:
        self.peer = peer
        self._process = process
        self._log = log
        ready = self._read()
        self.seconds_to_ready: float = ready["seconds_to_ready"]
        self.versions: dict[str, str] = ready["versions"]
        self._signal(signal.SIGSTOP)

    def ask(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        """Continue prompts greedily by so many tokens each.

        Raises:
            PeerError: it ended, or gave fewer or more tokens.
        """
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer
            print(
                json.dumps({"prompts": prompts, "num_tokens": num_tokens}),
                file=self._process.stdin,
                flush=True,
            )
        answer = Answer(**self._read())
        self._signal(signal.SIGSTOP)
        lengths = {len(output) for output in answer.outputs}
        if len(answer.outputs) != len(prompts) or lengths != {num_tokens}:
            raise PeerError(
                f"{self.peer.name} gave {len(answer.outputs)} outputs of {sorted(lengths)} tokens; "
                f"asked for: {len(prompts)} of {num_tokens}"
            )
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = self._log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise PeerError(f"{self.peer.name} ended: {last[-1]} (all it said: {self._log})")
        return json.loads(line)  # type: ignore[no-any-return]

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


@contextlib.contextmanager
def running(peer: Peer, folder: Path, settings: dict[str, Any]) -> Iterator[Runner]:
    """Start a runner and wait until it has loaded; ends it and all that it has started.

    Raises:
        PeerError: it ended before.
    """
    log = folder / f"{peer.name}.run.log"
    arguments = [str(python_of(peer, folder)), str(_RUNNERS / peer.runner), json.dumps(settings)]
    variables = os.environ | peer.variables
    variables.pop("PYTHONPATH", None)
    if peer.environment is None:
        variables["PYTHONPATH"] = str(_REPOSITORY)
    with log.open("w") as said:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=variables,
            text=True,
            start_new_session=True,
        )
        try:
            yield Runner(peer, process, log)
        finally:
            _end(process)


def _end(process: "subprocess.Popen[str]") -> None:
    """Close its input; kill the group it leads, which also holds what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
    with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
        process.communicate(timeout=_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
