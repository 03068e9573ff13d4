"""What a locust process does in a load: send requests, collect samples, or both.

A process that sends reports about every second to the one that collects; alone, to itself. Reports
are messages of their own beside locust's statistics, which are rounded.
"""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import gevent
import grpc
from locust import LoadTestShape
from locust.env import Environment
from locust.exception import StopTest
from locust.rpc.protocol import Message
from locust.runners import STATE_RUNNING, STATE_SPAWNING, MasterRunner, Runner, WorkerRunner

from loadtests.collector import Collector
from loadtests.load import LoadSpec
from loadtests.node import Node
from loadtests.options import DEFAULT_TARGET, from_options
from loadtests.stages import load_at
from loadtests.users import GenerationUser

_REPORT_SECONDS = 1.0
_POLL_SECONDS = 0.05
_LOCAL = "local"


class StageShape(LoadTestShape):
    """Users of a closed loop over time."""

    abstract = True  # locust takes every other shape that it finds, asked or not

    def __init__(self, spec: LoadSpec) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._spec = spec

    def tick(self) -> tuple[int, float]:
        elapsed = time.perf_counter() - self.start_time
        users = math.ceil(load_at(self._spec.stages, elapsed))
        return users, float(self._spec.users)


class Session:
    """Of one locust process, over all loads that its web page starts.

    Raises:
        ValueError: the options describe no load.
    """

    def __init__(self, environment: Environment) -> None:
        assert environment.runner is not None, "locust makes it before its init event"
        self._environment = environment
        self._runner: Runner = environment.runner
        self._options: Any = environment.parsed_options
        self._node: Node | None = None
        self._collector: Collector | None = None
        spec = self._spec()
        if not isinstance(self._runner, WorkerRunner):
            self._runner.register_message("report", self._collect)
            if spec.rate is None and spec.shape != "steady":
                environment.shape_class = StageShape(spec)
        environment.events.test_start.add_listener(self._start)
        environment.events.test_stop.add_listener(self._stop)

    def _spec(self) -> LoadSpec:
        return from_options(self._options, target=self._environment.host or DEFAULT_TARGET)

    def _start(self, environment: Environment) -> None:
        try:
            self._begin()
        except Exception as error:  # locust would log it, and wait for ever
            reason = str(error) if isinstance(error, ValueError | StopTest) else repr(error)
            self._give_up(reason)
            raise StopTest(reason) from error

    def _begin(self) -> None:
        spec = self._spec()  # what the web page says may be wrong
        if not isinstance(self._runner, WorkerRunner):
            clients = self._runner.clients.ready if isinstance(self._runner, MasterRunner) else None
            # Goes to the workers with all options, so that each knows its part.
            self._options.nodes = [_LOCAL] if clients is None else [node.id for node in clients]
            path = Path(self._options.samples) if self._options.samples else None
            self._collector = Collector(spec, len(self._options.nodes), path)
        if isinstance(self._runner, MasterRunner):
            self._runner.greenlet.spawn(self._watch_workers, self._runner, self._collector)
        else:
            self._start_node(spec, self._options.nodes)

    def _start_node(self, spec: LoadSpec, nodes: list[str]) -> None:
        name = self._runner.client_id if isinstance(self._runner, WorkerRunner) else _LOCAL
        if name not in nodes:
            raise StopTest("a worker came after the load had begun")
        try:
            node = Node(spec, nodes.index(name), len(nodes))
        except grpc.RpcError as error:
            reason = f"{error.code().name}, {error.details()}"
            raise StopTest(f"{spec.target} does not say what it serves: {reason}") from None
        GenerationUser.node = self._node = node
        self._runner.greenlet.spawn(self._report_regularly, node)

    def _report_regularly(self, node: Node) -> None:
        while self._node is node:
            deadline = time.perf_counter() + _REPORT_SECONDS
            while not node.is_over() and time.perf_counter() < deadline:
                gevent.sleep(_POLL_SECONDS)
            if self._node is node:
                self._report(node)

    def _report(self, node: Node) -> None:
        report = node.report()
        if report["over"]:
            self._node = None
            node.close()
        self._runner.send_message("report", report)

    def _stop(self, environment: Environment) -> None:
        """Somebody stopped the load before its end, and locust has ended or left what was open."""
        if self._node is not None:
            self._node.stop()
            self._report(self._node)

    def _collect(self, environment: Environment, msg: Message) -> None:
        if self._collector is None:
            return
        try:
            self._collector.add(msg.data)
            _print({"requests": self._collector.num_requests})
            if self._collector.is_over:
                summary = self._collector.close()
                self._collector = None
                _print(dataclasses.asdict(summary))
                self._end()
        except OSError as error:
            self._give_up(f"samples cannot be written: {error.strerror}")

    def _watch_workers(self, master: MasterRunner, collector: Collector | None) -> None:
        while self._collector is collector:
            gevent.sleep(_REPORT_SECONDS)
            running = master.state in (STATE_RUNNING, STATE_SPAWNING)
            if running and master.worker_count < len(self._options.nodes):
                self._give_up("a worker ended before the load did; its samples are lost")

    def _give_up(self, reason: str) -> None:
        """End the load without a summary."""
        self._collector = None
        _print({"error": reason})
        self._environment.process_exit_code = 1
        self._end()

    def _end(self) -> None:
        # Both end the greenlet that calls this, so from another one.
        gevent.spawn(self._runner.quit if self._options.headless else self._runner.stop)


def _print(fields: dict[str, Any]) -> None:
    try:
        print(json.dumps(fields), flush=True)
    except BrokenPipeError:
        sys.exit("nobody reads this any more")  # gevent takes it to the main greenlet
