"""From a head configuration and memory to what it holds and how fast it decodes.

Everything about blocks is asked of the engine's own functions, so that a plan and a running
server cannot differ.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch

from models.config import ITEMSIZE, ModelConfig
from models.transformer import Transformer
from service.capacity.machine import MachineLimits
from service.capacity.pool import Pool
from service.capacity.query import CapacityQuery, query_violations
from service.capacity.step_model import StepModel
from service.capacity.step_time import DecodeStep, StepTime, decode_step, step_time
from service.engine.errors import InvalidRequestError, Violation
from service.engine.memory import check_kv_cache_bytes, page_bytes


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """What the memory holds, and how fast it decodes.

    Attributes:
        head_label: short name of the heads.
        kv_bytes_per_token: over all layers, until the token leaves a window.
        weight_bytes: of the whole model.
        kv_cache_bytes: memory of the blocks.
        num_blocks: as the server counts them: pages, where heads remember different stretches of
            the past, that are cut further.
        tokens: that the blocks hold; None where windows let one block serve many tokens.
        longest_request: prompt and output tokens of the longest request that fits, within the
            model's context.
        concurrent: so many requests run at once whatever their age; with no more, none waits for
            blocks and none is ever preempted.
        concurrent_mean: as many as fit on average, when their ages differ.
        waste: share of the blocks in use that holds nothing needed, on average.
        running: sequences of the predicted step: `clients`, or fewer if not so many fit.
        step: what the step has to do; None if not a single request fits.
        step_time: how long it takes; None without a step model or a measured machine, or if
            `no_prediction` says why the step model does not apply.
    """

    head_label: str
    dtype: str
    kv_cache_dtype: str
    block_size: int
    kv_bytes_per_token: int
    weight_bytes: int
    kv_cache_bytes: int
    num_blocks: int
    tokens: int | None
    longest_request: int
    concurrent: int
    concurrent_mean: int
    waste: float
    max_num_seqs: int
    running: int
    step: DecodeStep | None
    step_time: StepTime | None
    no_prediction: str | None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Of all running sequences together, prompts not counted."""
        return None if self.step_time is None else self.running / self.step_time.seconds


def plan_capacity(
    query: CapacityQuery,
    step_model: StepModel | None = None,
    machine: MachineLimits | None = None,
) -> CapacityPlan:
    """Answer a query.

    Args:
        step_model: predicts the step; without it `machine` says how long a copy of its bytes takes.

    Raises:
        InvalidRequestError: names every wrong field of the query.
    """
    violations = list(query_violations(query))
    if violations:
        raise InvalidRequestError(violations)
    model, engine = query.model, query.engine
    weights = weight_bytes(model)
    pool = Pool.of(query, _num_pages(query, weights))
    concurrent = pool.concurrent()
    plan = CapacityPlan(
        head_label=model.head_label,
        dtype=model.dtype,
        kv_cache_dtype=model.kv_cache_dtype,
        block_size=engine.block_size,
        kv_bytes_per_token=model.kv_bytes_per_token(),
        weight_bytes=weights,
        kv_cache_bytes=pool.num_pages * page_bytes(model, engine.block_size),
        num_blocks=pool.num_pages,
        tokens=pool.tokens,
        longest_request=pool.longest_request(query.max_model_len),
        concurrent=concurrent,
        concurrent_mean=max(concurrent, pool.concurrent_mean()) if concurrent else 0,
        waste=pool.waste(),
        max_num_seqs=engine.max_num_seqs,
        running=min(concurrent, engine.max_num_seqs, query.clients or concurrent),
        step=None,
        step_time=None,
        no_prediction=None if concurrent else "not a single request of this mix fits",
    )
    if concurrent == 0:
        return plan
    kv_bytes = plan.running * pool.mean_kv_bytes()
    step = decode_step(model, plan.running, weights, kv_bytes)
    try:
        time = step_time(step, model, step_model, machine)
    except ValueError as error:
        return dataclasses.replace(plan, step=step, no_prediction=str(error))
    why_not = None if time else "no step model is given and no machine was measured"
    return dataclasses.replace(plan, step=step, step_time=time, no_prediction=why_not)


@functools.lru_cache(maxsize=256)
def weight_bytes(model: ModelConfig) -> int:
    """Bytes of all parameters in the model's type; allocates nothing."""
    with torch.device("meta"):
        return Transformer(model).num_parameters * ITEMSIZE[model.dtype]


def _num_pages(query: CapacityQuery, weights: int) -> int:
    cache_bytes = query.memory - weights * query.weights_included
    if cache_bytes < 1:
        raise InvalidRequestError(
            [Violation("memory", str(query.memory), f"more than the {weights} bytes of weights")]
        )
    engine = dataclasses.replace(query.engine, kv_cache_bytes=cache_bytes, num_blocks=None)
    try:
        check_kv_cache_bytes(query.model, engine)
    except ValueError as error:
        raise InvalidRequestError(
            [Violation("memory", f"{cache_bytes} bytes for the cache", f"more; {error}")]
        ) from error
    return cache_bytes // page_bytes(query.model, engine.block_size)
