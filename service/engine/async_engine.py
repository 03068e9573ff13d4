"""The engine on its own thread, and its asyncio face. Nothing else crosses between the two.

Only the engine thread touches scheduler, blocks and torch, and it is the only one that ever runs
a parallel torch operation, model loading included: a second OpenMP pool would slow every step.
Commands go in through a `SimpleQueue`; results come out with one `call_soon_threadsafe` per step.
Other work with tensors comes here too, as calls: at most one between two steps, so that streams
slow down by the time of one call per token, and calls wait for one step each.
"""

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import TypeVar

import torch

from service.engine.commands import Abort, AbortAll, Add, Call, CallQueue, Command, Stop, Stream
from service.engine.engine import Engine, EngineRequest
from service.engine.errors import (
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    EngineStalledError,
    RequestLostError,
)
from service.engine.sequence import FinishReason, SequenceOutput
from service.engine.stats import EngineLoad

T = TypeVar("T")
log = logging.getLogger(__name__)


class AsyncEngine:
    """An engine that asyncio code can share.

    Args:
        build: makes the engine; runs on the engine thread.
        num_threads: torch threads of the engine thread; None takes all cores.
        stall_seconds: without a finished step for so long, while there is work, the engine
            counts as stalled.
    """

    def __init__(
        self, build: Callable[[], Engine], *, num_threads: int | None, stall_seconds: float
    ) -> None:
        self._build = build
        self._num_threads = num_threads
        self._stall_seconds = stall_seconds
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._streams: dict[int, Stream] = {}
        self._calls = CallQueue()
        self._thread: threading.Thread | None = None
        self._engine: Engine | None = None
        self._load: EngineLoad | None = None
        self._busy_since: float | None = None
        self._draining = False
        self._dead = False
        self._num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def engine(self) -> Engine:
        """The engine, for its constant facts (configuration, limits, cache size) only."""
        assert self._engine is not None, "start() has returned"
        return self._engine

    @property
    def load(self) -> EngineLoad:
        assert self._load is not None, "start() has returned"
        return self._load

    @property
    def step_age(self) -> float:
        """Seconds since the engine began its current step; 0 between steps and when idle."""
        busy_since = self._busy_since
        return 0.0 if busy_since is None else time.monotonic() - busy_since

    @property
    def is_draining(self) -> bool:
        return self._draining

    async def start(self) -> None:
        """Start the thread and build the engine on it; raises what building raises."""
        self._loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="engine", daemon=True
        )
        self._thread.start()
        await started

    async def run(self, request: EngineRequest) -> AsyncGenerator[SequenceOutput, None]:
        """Results of one request, until one of them has a `finish`.

        Closing the iterator early aborts the request; its blocks are free before the next step.

        Raises:
            EngineError: the request was refused, or the engine is draining or dead.
        """
        stream = Stream()
        with self._open(Add(request, stream)):
            finished = False
            try:
                while not finished:
                    output = await stream.get()
                    finished = output.finish is not None
                    yield output
            except EngineError:
                finished = True
                raise
            finally:
                if not finished:
                    self._commands.put(Abort(stream))

    async def call(self, function: Callable[[Engine], T]) -> T:
        """The result of a function that runs on the engine thread, between two steps.

        It has to be short: no stream goes on while it runs. A caller that is cancelled before it
        began skips it. What it raises, this raises.

        Raises:
            EngineError: the engine is draining or dead, or `max_waiting_requests` calls wait.
        """
        call = Call(function)
        with self._open(call):
            return await asyncio.wrap_future(call.answer)

    @contextlib.contextmanager
    def _open(self, command: Command) -> Iterator[None]:
        """Hand in a command; a drain waits until the block is left."""
        if self._draining:
            raise EngineDrainingError
        self.check_alive()
        self._commands.put(command)
        # The thread may have ended since; whatever it had not taken then, it never will.
        self.check_alive()
        self._num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_open -= 1
            if self._num_open == 0:
                self._idle.set()

    def check_alive(self) -> None:
        """Raise EngineDeadError if the engine thread has ended."""
        if self._thread is None or self._dead:
            raise EngineDeadError

    def check_health(self) -> None:
        """Raise unless the engine lives and, if it has work, makes progress.

        Raises:
            EngineDeadError, EngineStalledError
        """
        self.check_alive()
        seconds = self.step_age
        if seconds > self._stall_seconds:
            raise EngineStalledError(seconds)

    async def drain(self, seconds: float) -> bool:
        """Take no new requests; wait for the open ones, then cancel the rest.

        Returns:
            Whether all open requests ended by themselves in time.
        """
        self._draining = True
        if self._idle.is_set():
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
            return True
        except TimeoutError:
            self._commands.put(AbortAll())
            with contextlib.suppress(TimeoutError):  # their last messages are on the way
                await asyncio.wait_for(self._idle.wait(), self._stall_seconds)
            return False

    async def shutdown(self) -> None:
        """Stop the thread; open requests end with EngineDeadError.

        A stalled step is not waited for longer than `stall_seconds`: the thread is a daemon.
        """
        self._draining = True
        self._commands.put(Stop())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, self._stall_seconds)

    # Everything below runs on the engine thread, except `_dispatch`.

    def _run(self, started: "asyncio.Future[None]") -> None:
        try:
            torch.set_num_threads(self._num_threads or len(os.sched_getaffinity(0)))
            engine = self._build()
        except BaseException as error:  # whatever it is, the starter must hear of it
            self._dead = True
            self._call_on_loop(started.set_exception, error)
            return
        self._engine, self._load = engine, engine.load
        self._call_on_loop(started.set_result, None)
        try:
            self._serve(engine)
        except Exception:
            log.exception("engine failed")
        finally:
            self._dead = True  # before the queue is emptied: see run()
            self._lose_requests(engine)
            refused: list[Stream] = []
            while not self._commands.empty():
                match self._commands.get():
                    case Add(_, stream):
                        refused.append(stream)
                    case Call() as call:
                        call.refuse(EngineDeadError())
            self._deliver(refused, [EngineDeadError() for _ in refused])
            self._calls.refuse_all(EngineDeadError())

    def _lose_requests(self, engine: Engine) -> None:
        """End what the engine has not finished; whatever killed it may have damaged its state."""
        try:
            engine.scheduler.abort_all(FinishReason.ERROR)
        except Exception:
            log.exception("the engine's requests were not ended in order")
        self._deliver([*self._streams.values()], [RequestLostError() for _ in self._streams])
        self._streams.clear()

    def _serve(self, engine: Engine) -> None:
        while self._apply_commands(engine):
            self._busy_since = time.monotonic()
            if self._calls:
                self._calls.run_next(engine)
                self._busy_since = time.monotonic()
            outputs = engine.step() if engine.has_unfinished else []
            self._busy_since = None
            self._publish(engine, outputs)

    def _apply_commands(self, engine: Engine) -> bool:
        """Apply what has been asked for, waiting for something to do; False means stop."""
        while True:
            try:
                idle = not (engine.has_unfinished or self._calls)
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            match command:
                case Add(request, stream):
                    self._add(engine, request, stream)
                case Abort(stream):
                    if stream.seq_id is not None:
                        self._streams.pop(stream.seq_id, None)
                        engine.abort(stream.seq_id)
                    self._load = engine.load
                case AbortAll():
                    self._publish(engine, engine.scheduler.abort_all(FinishReason.CANCELLED))
                    self._calls.refuse_all(EngineDrainingError())
                case Call() as call:
                    self._calls.add(call, limit=engine.config.max_waiting_requests)
                case Stop():
                    return False

    def _add(self, engine: Engine, request: EngineRequest, stream: Stream) -> None:
        try:
            stream.seq_id = engine.add(request)
        except EngineError as error:
            self._deliver([stream], [error])
            return
        self._streams[stream.seq_id] = stream
        self._load = engine.load

    def _publish(self, engine: Engine, outputs: list[SequenceOutput]) -> None:
        self._load = engine.load
        self._deliver([self._streams[output.seq_id] for output in outputs], outputs)
        for output in outputs:
            if output.finish is not None:
                del self._streams[output.seq_id]

    def _deliver(
        self, streams: list[Stream], results: SequenceOf[SequenceOutput | EngineError]
    ) -> None:
        """Hand out one result for each stream."""
        if streams:
            self._call_on_loop(_dispatch, streams, results)

    def _call_on_loop(self, function: Callable[..., object], *args: object) -> None:
        # The loop may be closed already when a process ends without shutdown().
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)


def _dispatch(streams: list[Stream], results: SequenceOf[SequenceOutput | EngineError]) -> None:
    for stream, result in zip(streams, results, strict=True):
        stream.put(result)
