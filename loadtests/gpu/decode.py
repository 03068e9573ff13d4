"""Steps of an engine that decodes at a given context, against the bytes that they read."""

import random
import statistics
import time
from typing import Any

import torch

from loadtests.gpu.shapes import step_bytes
from models.gpu.decode_graphs import Capture
from models.transformer import Transformer
from service.engine.config import EngineConfig
from service.engine.engine import Engine, EngineRequest
from service.engine.plan import StepResult
from service.engine.sampling_params import SamplingParams

# Steps that are timed together, and before them.
STEPS = 64
_WARM_UP = 8
_BLOCK_SIZE = 16
# Sequences end only when they are told to.
_ROOM = STEPS + _WARM_UP + 8


def blocks_for(batch: int, context: int) -> int:
    return batch * -(-(context + _ROOM) // _BLOCK_SIZE)


def decoding_engine(
    model: Transformer,
    *,
    max_batch: int,
    max_context: int,
    num_blocks: int,
    capture: Capture | None = None,
) -> Engine:
    """An engine whose cache holds anything, for `fill`."""
    engine = Engine(
        model,
        EngineConfig(
            block_size=_BLOCK_SIZE,
            num_blocks=num_blocks,
            max_num_seqs=max_batch,
            max_num_batched_tokens=max_batch * max_context,
            max_model_len=max_context + _ROOM,
            max_waiting_requests=max_batch,
            max_waiting_tokens=max_batch * max_context,
        ),
        capture=capture,
    )
    engine.kv_cache.pool.normal_()
    return engine


def fill(engine: Engine, batch: int, context: int) -> None:
    """Let so many sequences decode, as if their prompts had been computed: what the cache holds
    already stands for their keys and values, which take as long to read."""
    rng = random.Random(0)  # noqa: S311, a workload is no secret
    vocab_size = engine.model_config.vocab_size
    params = SamplingParams(max_tokens=_ROOM, temperature=0.0, ignore_eos=True)
    for _ in range(batch):
        prompt = [rng.randrange(vocab_size) for _ in range(context)]
        engine.add(EngineRequest(prompt, params))
    plan = engine.scheduler.schedule()
    assert [item.num_tokens for item in plan.scheduled] == [context] * batch, "all in one step"
    engine.scheduler.update(plan, [StepResult(token_id=0)] * batch)


def empty(engine: Engine) -> None:
    for seq in list(engine.scheduler.running):
        engine.abort(seq.seq_id)


def measure(engine: Engine, batch: int, context: int, bandwidth: float) -> dict[str, Any]:
    """Milliseconds of a step in a loop, and the least that a device of this bandwidth (bytes per
    second) could take."""
    fill(engine, batch, context)
    for _ in range(_WARM_UP):
        engine.step()
    rounds = []
    for _ in range(4):
        _wait(engine)
        started = time.perf_counter()
        for _ in range(STEPS // 4):
            engine.step()
        _wait(engine)
        rounds.append((time.perf_counter() - started) / (STEPS // 4))
    empty(engine)
    step = statistics.median(rounds)
    num_bytes = step_bytes(engine.model_runner.model, batch, context + _WARM_UP + STEPS // 2)
    return {
        "batch": batch,
        "context": context,
        "step_ms": round(1000 * step, 4),
        "step_ms_range": [round(1000 * limit(rounds), 4) for limit in (min, max)],
        "tokens_per_s": round(batch / step, 1),
        "bytes": num_bytes,
        "floor_ms": round(1000 * num_bytes / bandwidth, 4),
        "share_of_copy_bandwidth": round(num_bytes / bandwidth / step, 3),
    }


def _wait(engine: Engine) -> None:
    if engine.model_runner.model.device.type == "cuda":
        torch.cuda.synchronize()


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much slower than the fewest key/value heads of a shape the others are, and what their
    bytes predict; rows of equal batch and context."""
    found = []
    for row in rows:
        base = next(
            other
            for other in reversed(rows)
            if all(other[key] == row[key] for key in ("shape", "batch", "context"))
        )
        if base is not row:
            measured = row["step_ms"] / base["step_ms"]
            predicted = row["bytes"] / base["bytes"]
            found.append(
                {
                    **{key: row[key] for key in ("shape", "kv_heads", "batch", "context")},
                    "measured": round(measured, 3),
                    "predicted": round(predicted, 3),
                    "off_by": round(measured / predicted - 1, 3),
                }
            )
    return found
