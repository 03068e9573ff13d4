"""A process that serves has one pool of OpenMP threads. A second one, made by whichever thread
runs a parallel operation first, would fight with it for the cores in every step."""

import subprocess
import sys

_SCRIPT = """
import asyncio, os
import torch
from service.engine.async_engine import AsyncEngine
from service.engine.config import EngineConfig
from service.engine.engine import Engine, EngineRequest
from tests.engine.tiny import greedy, tiny_model

POOL = 3

def num_threads():
    return len(os.listdir("/proc/self/task"))

def build():
    return Engine(tiny_model(), EngineConfig(num_blocks=64, num_threads=POOL))

async def serve():
    engine = AsyncEngine(build, num_threads=POOL, stall_seconds=60)
    before = num_threads()
    await engine.start()
    async for _ in engine.run(EngineRequest([1, 2, 3], greedy(4))):
        pass
    # An operation that all threads take part in, on the engine's own.
    await engine.call(lambda engine: torch.randn(1 << 20).exp_().sum())
    return num_threads() - before - 1  # without the engine's thread itself

def parallel_operation():
    torch.set_num_threads(POOL)
    torch.randn(1 << 20).exp_().sum()

def operation():
    start = num_threads()
    parallel_operation()
    return num_threads() - start

def in_a_child(count):
    child = os.fork()
    if child == 0:
        print(count(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

# Importing takes longer than all else; nothing parallel has run before.
in_a_child(operation)
in_a_child(lambda: asyncio.run(serve()))
in_a_child(lambda: operation() + asyncio.run(serve()))
"""


def test_only_the_engine_has_a_pool() -> None:
    """Serving makes as many threads as one parallel operation does; where another thread has run
    one before, there are more, so the count would show it."""
    answer = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True
    )
    one_pool, served, served_beside_another = map(int, answer.stdout.split())
    assert one_pool >= 2
    assert served == one_pool
    assert served_beside_another > one_pool
