"""What asyncio code asks of the engine thread, and how the answers come back."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from service.engine.engine import Engine, EngineRequest
from service.engine.errors import EngineError, QueueFullError
from service.engine.sequence import SequenceOutput


class Stream:
    """Results of one request on their way to its reader; what piles up is handed out merged."""

    def __init__(self) -> None:
        self.seq_id: int | None = None
        self._outputs: list[SequenceOutput] = []
        self._error: EngineError | None = None
        self._ready = asyncio.Event()

    def put(self, result: SequenceOutput | EngineError) -> None:
        if isinstance(result, EngineError):
            self._error = result
        else:
            self._outputs.append(result)
        self._ready.set()

    async def get(self) -> SequenceOutput:
        await self._ready.wait()
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            if self._error is None:
                self._ready.clear()
            return SequenceOutput.merge(outputs)
        assert self._error is not None, "a ready stream has an output or an error"
        raise self._error


@dataclass(frozen=True, slots=True)
class Add:
    request: EngineRequest
    stream: Stream


@dataclass(frozen=True, slots=True)
class Abort:
    stream: Stream


@dataclass(frozen=True, slots=True)
class AbortAll:
    pass


@dataclass(frozen=True, slots=True)
class Stop:
    pass


@dataclass(frozen=True, slots=True)
class Call:
    """Run a function between two steps.

    Attributes:
        answer: cancelled by a caller that has gone away.
    """

    function: Callable[[Engine], Any]
    answer: "Future[Any]" = field(default_factory=Future)

    def run(self, engine: Engine) -> None:
        """Run it, unless nobody waits any more; its error is its caller's, not the engine's."""
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            result = self.function(engine)
        except BaseException as error:  # whatever it is, the caller must hear of it
            self.answer.set_exception(error)
        else:
            self.answer.set_result(result)

    def refuse(self, error: EngineError) -> None:
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)


class CallQueue:
    """Calls that wait for their turn between two steps."""

    def __init__(self) -> None:
        self._waiting: deque[Call] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, call: Call, *, limit: int) -> None:
        """Let a call wait, or refuse it where `limit` of them do."""
        if len(self._waiting) >= limit:
            call.refuse(QueueFullError(unit="calls", limit=limit))
        else:
            self._waiting.append(call)

    def run_next(self, engine: Engine) -> None:
        self._waiting.popleft().run(engine)

    def refuse_all(self, error: EngineError) -> None:
        while self._waiting:
            self._waiting.popleft().refuse(error)


Command: TypeAlias = Add | Abort | AbortAll | Stop | Call
