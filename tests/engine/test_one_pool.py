"""A process that serves has one pool of OpenMP threads. A second one, made by whichever thread
runs a parallel operation first, would fight with it for the cores in every step."""

import subprocess
import sys

_SCRIPT = """
import asyncio, os, sys
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

start = num_threads()
if sys.argv[1] == "operation":
    parallel_operation()
    print(num_threads() - start)
elif sys.argv[1] == "serve":
    print(asyncio.run(serve()))
else:
    parallel_operation()
    before = num_threads() - start
    print(before + asyncio.run(serve()))
"""


def threads_of(what: str) -> int:
    answer = subprocess.run(
        [sys.executable, "-c", _SCRIPT, what], capture_output=True, text=True, check=True
    )
    return int(answer.stdout)


def test_only_the_engine_has_a_pool() -> None:
    """Serving makes as many threads as one parallel operation does; where another thread has run
    one before, there are more, so the count would show it."""
    one_pool = threads_of("operation")
    assert one_pool >= 2
    assert threads_of("serve") == one_pool
    assert threads_of("operation, then serve") > one_pool
