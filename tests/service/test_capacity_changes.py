"""Changes that would reach a target: each is planned in full, and the memory is the least."""

import dataclasses
import math

import pytest

from models.config import HeadConfig
from service.capacity import (
    CapacityQuery,
    Change,
    MachineLimits,
    RequestShape,
    StepModel,
    Target,
    find_changes,
    plan_capacity,
)
from service.engine import EngineConfig
from service.engine.errors import InvalidRequestError
from tests.models.tiny import llama

LAYERS = (HeadConfig(12, 12, 8), HeadConfig(12, 3, 8), HeadConfig(12, 12, 8, window=100))
QUERY = CapacityQuery(
    model=llama(layers=LAYERS, max_position_embeddings=1024),
    memory=3 * 2**20,
    weights_included=False,
    mix=(RequestShape(200, 100),),
    engine=EngineConfig(block_size=16, max_num_seqs=4, max_num_batched_tokens=64),
)
ROOMY = dataclasses.replace(
    QUERY, engine=EngineConfig(block_size=16, max_num_seqs=64, max_num_batched_tokens=64)
)
STEP_MODEL = StepModel(
    a=0.001, c=1e-9, e=1e-9, r2=1, error=0, slopes={}, weight_bytes=(0, 1e9), kv_bytes=(0, 1e9)
)


def _by_name(changes: tuple[Change, ...]) -> dict[str, Change]:
    return {change.what: change for change in changes}


def test_every_change_is_the_plan_of_the_changed_configuration() -> None:
    changes = _by_name(find_changes(ROOMY, Target(concurrent=20), STEP_MODEL))
    assert sorted(changes) == sorted(
        [
            *(f"{number} key/value heads" for number in (6, 4, 3, 2, 1)),
            *(f"windows of {number} tokens" for number in (256, 128, 64)),
            "bfloat16",
            "keys and values of 8 bits",
            "blocks of 8 tokens",
            "blocks of 32 tokens",
            *(what for what in changes if what.endswith("MiB of memory")),
            *(what for what in changes if what.startswith("max_num_seqs")),
        ]
    )
    layers = (HeadConfig(12, 4, 8), HeadConfig(12, 3, 8), HeadConfig(12, 4, 8, window=100))
    changed = dataclasses.replace(ROOMY, model=QUERY.model.replace(layers=layers))
    assert changes["4 key/value heads"].plan == plan_capacity(changed, STEP_MODEL)
    narrow = tuple(dataclasses.replace(heads, window=64) for heads in LAYERS)
    changed = dataclasses.replace(ROOMY, model=QUERY.model.replace(layers=narrow))
    assert changes["windows of 64 tokens"].plan == plan_capacity(changed, STEP_MODEL)
    assert changes["bfloat16"].plan.kv_bytes_per_token * 2 == QUERY.model.kv_bytes_per_token()
    assert changes["blocks of 8 tokens"].plan.block_size == 8


def test_those_that_reach_the_target_come_first() -> None:
    target = Target(concurrent=20)
    changes = find_changes(QUERY, target)
    reaches = [change.reaches for change in changes]
    assert reaches == sorted(reaches, reverse=True)
    assert set(reaches) == {True, False}
    for change in changes:
        assert change.reaches == (min(change.plan.concurrent, change.plan.max_num_seqs) >= 20)


@pytest.mark.parametrize(
    "target",
    [Target(concurrent=20), Target(context=900), Target(tokens_per_s=1500.0)],
    ids=["concurrent", "context", "tokens per second"],
)
def test_the_memory_is_the_least_that_reaches_the_target(target: Target) -> None:
    query = dataclasses.replace(
        QUERY, memory=2**20, engine=dataclasses.replace(QUERY.engine, max_num_seqs=64)
    )
    assert not target.is_reached(plan_capacity(query, STEP_MODEL))
    (found,) = (c for c in find_changes(query, target, STEP_MODEL) if "memory" in c.what)
    assert found.reaches
    mebibytes = int(found.what.split()[0])
    less = dataclasses.replace(query, memory=(mebibytes - 1) * 2**20)
    assert not target.is_reached(plan_capacity(less, STEP_MODEL))
    enough = dataclasses.replace(query, memory=mebibytes * 2**20)
    assert found.plan == plan_capacity(enough, STEP_MODEL)


def test_requests_that_fit_but_do_not_run_do_not_reach_a_target() -> None:
    plan = plan_capacity(dataclasses.replace(QUERY, memory=2**30))
    assert plan.concurrent > 20 > plan.max_num_seqs
    assert not Target(concurrent=20).is_reached(plan)
    assert Target(concurrent=plan.max_num_seqs).is_reached(plan)


def test_memory_and_sequences_are_named_together_where_both_are_short() -> None:
    target = Target(concurrent=20)
    assert plan_capacity(QUERY).concurrent < 20
    changes = find_changes(QUERY, target)
    assert [c for c in changes if not c.what.startswith("max_num_seqs")] == [
        c for c in changes if c.what.endswith(" and max_num_seqs 20")
    ]
    (found,) = (change for change in changes if "memory" in change.what)
    assert found.reaches
    mebibytes = int(found.what.split()[0])
    engine = dataclasses.replace(QUERY.engine, max_num_seqs=20)
    both = dataclasses.replace(QUERY, memory=mebibytes * 2**20, engine=engine)
    assert found.plan == plan_capacity(both)
    for short in (
        dataclasses.replace(both, memory=(mebibytes - 1) * 2**20),
        dataclasses.replace(both, engine=QUERY.engine),
    ):
        assert not target.is_reached(plan_capacity(short))


def test_more_requests_than_tokens_of_a_step_need_a_larger_step_too() -> None:
    changes = find_changes(QUERY, Target(concurrent=100))
    (found,) = (change for change in changes if "memory" in change.what)
    assert found.reaches
    assert found.what.endswith(" and max_num_seqs 100 and max_num_batched_tokens 100")


def test_no_memory_helps_where_the_engine_runs_no_more_sequences() -> None:
    changes = find_changes(QUERY, Target(tokens_per_s=1e9), STEP_MODEL)
    assert not any(change.reaches for change in changes)
    assert not any("memory" in change.what for change in changes)
    (more,) = (change for change in changes if change.what.startswith("max_num_seqs"))
    assert more.plan.running > 4


def test_a_target_that_makes_no_sense_is_refused_by_its_field() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        find_changes(QUERY, Target(concurrent=0, tokens_per_s=math.nan, context=1025))
    assert [str(violation) for violation in caught.value.violations] == [
        "target.concurrent is 0; allowed: 1 to 1000000",
        "target.context is 1025; allowed: 1 to 1024 tokens",
        "target.tokens_per_s is nan; allowed: above 0, finite",
        "target.tokens_per_s is set; allowed: unset without anything to predict it from",
    ]


def test_a_copy_can_answer_a_rate_too() -> None:
    machine = MachineLimits(1e9, dict.fromkeys(("float32", "bfloat16", "float16"), 1e9))
    assert find_changes(QUERY, Target(tokens_per_s=1.0), machine=machine)
