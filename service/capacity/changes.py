"""Which changes of a configuration would reach a target, one at a time, and what each may cost.

Where the target is more requests than the engine runs at once, each comes with a larger engine.

What a change does to blocks and bytes is computed. What it does to quality is not: that has to be
measured with the changed model.
"""

import bisect
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from models.config import HeadConfig
from models.errors import ConfigError
from service.capacity.machine import MachineLimits
from service.capacity.plan import CapacityPlan, plan_capacity
from service.capacity.query import MAX_CLIENTS, MAX_MEMORY, CapacityQuery, query_violations
from service.capacity.step_model import StepModel
from service.engine.errors import InvalidRequestError, Violation

_BLOCK_SIZES = (8, 16, 32)
_LEAST_WINDOW_POWER = 6
_MAX_WINDOWS = 4
_MIB = 2**20

_HEADS_COST = (
    "The weights change: heads have to be merged and the model trained on, or trained anew. "
    "Measure what it loses."
)
_WINDOW_COST = (
    "A layer no longer sees tokens further back than the window. Measure what it loses on long "
    "inputs."
)
_DTYPE_COST = "Numbers are rounded to 16 bits. Measure what it loses."
_KV_DTYPE_COST = "Keys and values are rounded to 8 bits. Measure what it loses."
_BLOCK_COST = "The model computes the same; smaller blocks make longer tables."
_SEQUENCES_COST = "Steps have more to do, so each token takes longer."
_MEMORY_COST = "The model computes the same."

# What is changed, in words, its cost, and the changed query.
_Tried: TypeAlias = tuple[str, str, CapacityQuery]


@dataclass(frozen=True, slots=True)
class Target:
    """What a configuration has to reach; None is no matter.

    Attributes:
        concurrent: requests that always run together.
        tokens_per_s: decode tokens per second of all running sequences.
        context: prompt and output tokens of the longest request.
    """

    concurrent: int | None = None
    tokens_per_s: float | None = None
    context: int | None = None

    def is_reached(self, plan: CapacityPlan) -> bool:
        rate = plan.decode_tokens_per_s
        return (
            (self.concurrent is None or min(plan.concurrent, plan.max_num_seqs) >= self.concurrent)
            and (self.tokens_per_s is None or (rate is not None and rate >= self.tokens_per_s))
            and (self.context is None or plan.longest_request >= self.context)
        )


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that could be different.

    Attributes:
        what: the change, in words.
        cost: what to expect of it, in words.
        plan: of the changed configuration.
    """

    what: str
    cost: str
    plan: CapacityPlan
    reaches: bool


def find_changes(
    query: CapacityQuery,
    target: Target,
    step_model: StepModel | None = None,
    machine: MachineLimits | None = None,
) -> tuple[Change, ...]:
    """Every single change that was tried, those first that reach the target.

    Raises:
        InvalidRequestError: the query or the target is wrong, or the target is a rate and there
            is nothing to predict it from.
    """
    can_predict = step_model is not None or machine is not None
    violations = [
        *query_violations(query),
        *target_violations(target, query, can_predict=can_predict),
    ]
    if violations:
        raise InvalidRequestError(violations)

    def plan(changed: CapacityQuery) -> CapacityPlan:
        return plan_capacity(changed, step_model, machine)

    needed = target.concurrent or 0
    roomy, more = _with_sequences(query, needed)
    tried = [*_fewer_kv_heads(roomy), *_windows(roomy), *_types_and_blocks(roomy)]
    tried += _more_memory(roomy, target, plan)
    if more:
        tried = [
            (f"{what} and {more}", f"{cost} {_SEQUENCES_COST}", own) for what, cost, own in tried
        ]
    most = min(plan(query).concurrent, max(needed, query.engine.max_num_batched_tokens))
    larger, more = _with_sequences(query, most)
    if more:
        tried.append((more, _SEQUENCES_COST, larger))
    changes: list[Change] = []
    for what, cost, changed in tried:
        try:
            own = plan(changed)
        except InvalidRequestError:  # for example, no block of this size fits
            continue
        changes.append(Change(what, cost, own, target.is_reached(own)))
    return tuple(sorted(changes, key=lambda change: not change.reaches))


def _fewer_kv_heads(query: CapacityQuery) -> Iterator[_Tried]:
    layers = query.model.layers
    common = math.gcd(*(heads.num_heads for heads in layers))
    most = max(heads.num_kv_heads for heads in layers)
    for number in range(min(common, most - 1), 0, -1):
        if common % number == 0:
            changed = [
                dataclasses.replace(heads, num_kv_heads=min(heads.num_kv_heads, number))
                for heads in layers
            ]
            yield f"{number} key/value heads", _HEADS_COST, _with_layers(query, changed)


def _windows(query: CapacityQuery) -> Iterator[_Tried]:
    """Powers of two that some request is longer than."""
    longest = max(shape.cached_tokens for shape in query.mix)
    windows = [2**power for power in range(_LEAST_WINDOW_POWER, (longest - 1).bit_length())]
    for window in windows[::-1][:_MAX_WINDOWS]:
        changed = [_narrowed(heads, window) for heads in query.model.layers]
        if tuple(changed) != query.model.layers:
            yield f"windows of {window} tokens", _WINDOW_COST, _with_layers(query, changed)


def _types_and_blocks(query: CapacityQuery) -> Iterator[_Tried]:
    if query.model.dtype == "float32":
        model = query.model.replace(dtype="bfloat16")
        yield "bfloat16", _DTYPE_COST, dataclasses.replace(query, model=model)
    if query.model.kv_cache_dtype == "auto" and query.engine.kernel != "paged_triton":
        with contextlib.suppress(ConfigError):  # some heads cannot be kept so
            model = query.model.replace(kv_cache_dtype="int8")
            words = "keys and values of 8 bits"
            yield words, _KV_DTYPE_COST, dataclasses.replace(query, model=model)
    for block_size in _BLOCK_SIZES:
        if block_size != query.engine.block_size:
            engine = dataclasses.replace(query.engine, block_size=block_size)
            changed = dataclasses.replace(query, engine=engine)
            yield f"blocks of {block_size} tokens", _BLOCK_COST, changed


def _with_sequences(query: CapacityQuery, number: int) -> tuple[CapacityQuery, str]:
    """The query with an engine that runs so many sequences, and what that changes, in words."""
    names = ("max_num_seqs", "max_num_batched_tokens")
    words = " and ".join(
        f"{name} {number}" for name in names if getattr(query.engine, name) < number
    )
    engine = dataclasses.replace(
        query.engine,
        max_num_seqs=max(query.engine.max_num_seqs, number),
        max_num_batched_tokens=max(query.engine.max_num_batched_tokens, number),
    )
    return dataclasses.replace(query, engine=engine), words


def _more_memory(
    query: CapacityQuery, target: Target, plan: Callable[[CapacityQuery], CapacityPlan]
) -> Iterator[_Tried]:
    """The least memory that reaches the target, in whole MiB, if any does."""

    def reaches(mebibytes: int) -> bool:
        changed = dataclasses.replace(query, memory=mebibytes * _MIB)
        return target.is_reached(plan(changed))

    sizes = range(-(-query.memory // _MIB), MAX_MEMORY // _MIB + 1)
    at = bisect.bisect_left(sizes, True, key=reaches)
    if 0 < at < len(sizes):
        changed = dataclasses.replace(query, memory=sizes[at] * _MIB)
        yield f"{sizes[at]} MiB of memory", _MEMORY_COST, changed


def _narrowed(heads: HeadConfig, most: int) -> HeadConfig:
    windows = tuple(most if window is None else min(window, most) for window in heads.windows)
    alike = len(set(windows)) == 1
    return dataclasses.replace(heads, window=windows[0] if alike else windows)


def _with_layers(query: CapacityQuery, layers: Sequence[HeadConfig]) -> CapacityQuery:
    return dataclasses.replace(query, model=query.model.replace(layers=tuple(layers)))


def target_violations(
    target: Target, query: CapacityQuery, *, can_predict: bool
) -> Iterator[Violation]:
    """What is wrong with a target.

    Args:
        can_predict: there is a step model or a measured machine.
    """
    longest = query.max_model_len
    if target.concurrent is not None and not 1 <= target.concurrent <= MAX_CLIENTS:
        yield Violation("target.concurrent", str(target.concurrent), f"1 to {MAX_CLIENTS}")
    if target.context is not None and not 1 <= target.context <= longest:
        yield Violation("target.context", str(target.context), f"1 to {longest} tokens")
    rate = target.tokens_per_s
    if rate is not None and not 0 < rate < math.inf:
        yield Violation("target.tokens_per_s", str(rate), "above 0, finite")
    if rate is not None and not can_predict:
        yield Violation("target.tokens_per_s", "set", "unset without anything to predict it from")
