"""Servers in processes of their own: start, wait for a line, stop, and see that all is gone."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil


class Process:
    """A child whose output is read line by line.

    Args:
        arguments: of the program.
        program: this Python interpreter, if no other is named.
    """

    def __init__(self, *arguments: str, program: Path = Path(sys.executable)) -> None:
        self.lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        self._popen = subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        family = self.family()
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()
        self._reader.join()
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            pipe.close()
        for process in family:  # only what this child has started
            if process.is_running():
                process.kill()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def family(self) -> list[psutil.Process]:
        """The child's own children, theirs, and so on."""
        try:
            return psutil.Process(self._popen.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def wait_for(self, wanted: Callable[[str], bool], seconds: float = 180) -> str:
        """The first line that is wanted; fails if the child ends before it, or too late."""

        def found() -> str | None:
            return next((line for line in self.lines if wanted(line)), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, seconds)
        line = found()
        assert line is not None, f"the process printed only:\n{self.output}"
        return line

    def write(self, line: str) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(line + "\n")
        self._popen.stdin.flush()

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def end_of_input(self) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def wait(self, seconds: float = 180) -> int:
        code = self._popen.wait(seconds)
        self._reader.join()
        return code

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
