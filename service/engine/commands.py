"""What asyncio code asks of the engine thread, and how the answers come back."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from service.engine.engine import Engine, EngineRequest
from service.engine.errors import EngineError
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


Command: TypeAlias = Add | Abort | AbortAll | Stop | Call
