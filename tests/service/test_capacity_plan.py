"""A plan equals what the real engine allocates and what the real scheduler carries."""

import dataclasses
import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from models.config import HeadConfig, ModelConfig
from models.transformer import random_model
from service.capacity import CapacityQuery, MachineLimits, RequestShape, StepModel, plan_capacity
from service.engine import Engine, EngineConfig, SamplingParams
from service.engine.engine import EngineRequest
from service.engine.errors import InvalidRequestError, NeverFitsError
from service.engine.memory import block_groups, page_bytes
from service.engine.sequence import Sequence
from service.engine.stats import StepStats
from tests.fakes import SchedulerLoop
from tests.models.tiny import gpt2, llama

CONTEXT = 64
LIMITS = EngineConfig(block_size=4, max_num_seqs=64, max_num_batched_tokens=256)
STEP_MODEL = StepModel(
    a=0.001, c=1e-9, e=2e-9, r2=1, error=0, slopes={}, weight_bytes=(0, 1e9), kv_bytes=(0, 1e9)
)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Decoders whose layers differ in heads, windows and sink tokens."""
    windows = [None, None, 3, 8, (None, None, 8, 8), (5, 5, 12, 12)]
    layers = [
        HeadConfig(
            num_heads=4,
            num_kv_heads=draw(st.sampled_from([1, 2, 4])),
            head_dim=draw(st.sampled_from([8, 8, 12])),
            window=draw(st.sampled_from(windows)),
            sink_tokens=draw(st.sampled_from([0, 0, 3])),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    return llama(
        layers=tuple(layers),
        max_position_embeddings=CONTEXT,
        kv_cache_dtype=draw(st.sampled_from(["auto", "auto", "int8"])),
    )


@st.composite
def queries(draw: st.DrawFn, num_shapes: int = 1, min_step_tokens: int = 256) -> CapacityQuery:
    """Queries with memory for a few requests of up to `num_shapes` shapes."""
    model = draw(models())
    block_size = draw(st.sampled_from([1, 2, 4, 8, 16]))
    mix = tuple(
        RequestShape(draw(st.integers(1, 24)), draw(st.integers(2, 24)), draw(st.integers(1, 3)))
        for _ in range(draw(st.integers(1, num_shapes)))
    )
    longest = max(shape.cached_tokens for shape in mix)
    most = max(4, 5 * len(model.layers) * -(-longest // block_size))
    num_pages = draw(st.integers(len(block_groups(model, block_size)), most))
    engine = EngineConfig(
        block_size=block_size,
        max_num_seqs=16,
        max_num_batched_tokens=draw(st.sampled_from([256, min_step_tokens])),
    )
    memory = num_pages * page_bytes(model, block_size)
    return CapacityQuery(model, memory, weights_included=False, mix=mix, engine=engine)


def _loop(query: CapacityQuery, num_blocks: int) -> SchedulerLoop:
    """A real scheduler and block manager, on so many blocks."""
    most = query.engine.max_num_batched_tokens
    return SchedulerLoop(
        num_blocks=num_blocks,
        block_size=query.engine.block_size,
        max_num_seqs=most,
        max_num_batched_tokens=most,
        groups=block_groups(query.model, query.engine.block_size),
        max_model_len=CONTEXT,
    )


def _params(shape: RequestShape) -> SamplingParams:
    return SamplingParams(max_tokens=shape.output, temperature=0, ignore_eos=True)


def _carries(query: CapacityQuery, num_blocks: int, num_requests: int, age: int) -> bool:
    """Whether so many requests run together to their end: all but one start together, the last
    when they have made `age` steps; none waits and none is preempted."""
    (shape,) = query.mix
    loop = _loop(query, num_blocks)
    try:
        for _ in range(num_requests - 1):
            loop.add([1] * shape.prompt, _params(shape))
        for _ in range(age):
            loop.step()
        loop.add([1] * shape.prompt, _params(shape))
    except NeverFitsError:
        return False
    while loop.scheduler.has_unfinished:
        loop.step()
        if loop.scheduler.waiting or loop.num_preempted:
            return False
    return True


@settings(max_examples=60, deadline=None)
@given(queries())
def test_concurrency_is_what_the_scheduler_carries_and_not_one_more(query: CapacityQuery) -> None:
    plan = plan_capacity(query)
    (shape,) = query.mix
    # All prompts fit into one step, so that only blocks decide.
    assume((plan.concurrent + 1) * (shape.prompt + 1) <= 256 and plan.concurrent <= 12)
    ages = range(shape.output)

    def carries(number: int) -> bool:
        return all(_carries(query, plan.num_blocks, number, age) for age in ages)

    assert plan.concurrent == 0 or carries(plan.concurrent)
    assert not carries(plan.concurrent + 1)


@settings(max_examples=100, deadline=None)
@given(queries(num_shapes=3, min_step_tokens=16), st.randoms(use_true_random=False))
def test_as_many_as_planned_never_wait_for_blocks(query: CapacityQuery, rng: random.Random) -> None:
    """Whatever arrives when, in any mix, also where prompts are computed in pieces."""
    plan = plan_capacity(query)
    assume(0 < plan.concurrent <= 12)
    weights = [shape.share * (shape.output - 1) for shape in query.mix]
    slots = [
        shape
        for shape, weight in zip(query.mix, weights, strict=True)
        for _ in range(-(-plan.concurrent * weight // sum(weights)))
    ]
    assume(len(slots) <= query.engine.max_num_batched_tokens)
    loop = _loop(query, plan.num_blocks)
    starts = [[rng.randrange(25), rng.randrange(25)] for _ in slots]
    current: dict[int, Sequence] = {}
    while any(starts) or loop.scheduler.has_unfinished:
        for index, shape in enumerate(slots):
            is_free = index not in current or loop.num_finishes(current[index])
            if is_free and starts[index] and len(loop.plans) >= starts[index][0]:
                starts[index].pop(0)
                current[index] = loop.add([1] * shape.prompt, _params(shape))
        tokens = sum(loop.step().values())
        has_budget = tokens < query.engine.max_num_batched_tokens
        assert not (loop.scheduler.waiting and has_budget), "a request waits for blocks"
    assert loop.num_preempted == 0


@settings(max_examples=25, deadline=None)
@given(queries())
def test_blocks_are_those_of_a_real_engine(query: CapacityQuery) -> None:
    plan = plan_capacity(query)
    dtype = query.model.kv_cache_dtype
    limits = dataclasses.replace(query.engine, kv_cache_bytes=query.memory, kv_cache_dtype=dtype)
    engine = Engine(random_model(query.model, seed=0), limits)
    assert plan.num_blocks == engine.kv_cache.num_pages == engine.load.kv_blocks_total
    assert plan.kv_cache_bytes == engine.kv_cache.nbytes
    assert plan.kv_bytes_per_token == engine.kv_bytes_per_token
    assert plan.weight_bytes == engine.model_runner.model.num_parameters * 4
    prompt = [1] * (plan.longest_request - 1)
    engine.add(EngineRequest(prompt, SamplingParams(max_tokens=1)))
    if plan.longest_request < CONTEXT:
        with pytest.raises(NeverFitsError):
            engine.add(EngineRequest([*prompt, 1], SamplingParams(max_tokens=1)))


def test_a_real_engine_reads_what_the_plan_says_and_holds_what_it_says() -> None:
    """One request after the other, every decode step counted."""
    layers = (HeadConfig(4, 2, 8), HeadConfig(4, 1, 8, window=6), HeadConfig(4, 4, 8))
    model = llama(layers=layers)
    mix = (RequestShape(5, 9, share=2), RequestShape(20, 3, share=1))
    memory = 100 * page_bytes(model, 4)
    plan = plan_capacity(CapacityQuery(model, memory, False, mix, LIMITS, clients=1))
    steps: list[StepStats] = []
    limits = dataclasses.replace(LIMITS, kv_cache_bytes=memory)
    engine = Engine(random_model(model, seed=0), limits, on_step=steps.append)
    for shape in (mix[0], mix[0], mix[1]):
        engine.generate([[1] * shape.prompt], _params(shape))
    decodes = [step for step in steps if step.phase == "decode"]
    assert plan.step is not None
    mean_kv_bytes = sum(step.kv_bytes for step in decodes) / len(decodes)
    assert plan.step.kv_bytes == pytest.approx(mean_kv_bytes)
    assert 0 < plan.waste < 1


def test_numbers_that_can_be_worked_out_by_hand() -> None:
    """MHA: 2 layers, 3 heads of 8, keys and values, float32: 384 bytes per token."""
    model = gpt2()
    query = CapacityQuery(model, 384 * 4 * 13 + 100, False, (RequestShape(7, 6),), LIMITS)
    plan = plan_capacity(query, STEP_MODEL)
    assert (plan.kv_bytes_per_token, plan.num_blocks, plan.tokens) == (384, 13, 52)
    assert plan.kv_cache_bytes == 384 * 52
    # Each holds 12 tokens in 3 blocks at the end, and the scheduler keeps one free beside each:
    # 4 + 4 + 4 is too much beside the 2 of a fourth.
    assert plan.concurrent == 3
    # Decode steps read 8 to 12 tokens, in 2 blocks once and in 3 four times.
    assert plan.waste == pytest.approx(1 - 50 / 56)
    assert plan.longest_request == 53
    assert plan.step is not None
    assert plan.step.kv_bytes == 3 * 10 * 384
    assert (plan.step.weight_flops_per_byte, plan.step.kv_flops_per_byte) == (1.5, 0.5)
    assert plan.step_time is not None
    seconds = 0.001 + 1e-9 * plan.weight_bytes + 2e-9 * 3 * 10 * 384
    assert plan.step_time.seconds == pytest.approx(seconds)
    assert plan.decode_tokens_per_s == pytest.approx(3 / seconds)
    assert plan.step_time.bound_by == "fixed"


def test_weights_come_out_of_the_memory_if_they_are_included() -> None:
    mix = (RequestShape(7, 6),)
    model = llama()
    weights = sum(p.numel() for p in random_model(model, seed=0).parameters()) * 4
    alone = plan_capacity(CapacityQuery(model, 100_000, False, mix, LIMITS))
    both = plan_capacity(CapacityQuery(model, 100_000 + weights, True, mix, LIMITS))
    assert both == alone
    with pytest.raises(InvalidRequestError, match=f"more than the {weights} bytes of weights"):
        plan_capacity(CapacityQuery(model, weights, True, mix, LIMITS))


def test_clients_and_max_num_seqs_bound_the_predicted_step() -> None:
    query = CapacityQuery(llama(), 10**6, False, (RequestShape(7, 6),), LIMITS)
    everything = plan_capacity(query, STEP_MODEL)
    assert everything.running == min(everything.concurrent, 64)
    assert plan_capacity(dataclasses.replace(query, clients=2)).running == 2
    few = dataclasses.replace(LIMITS, max_num_seqs=5)
    assert plan_capacity(dataclasses.replace(query, engine=few)).running == 5


def test_without_anything_to_predict_from_nothing_is_predicted() -> None:
    query = CapacityQuery(llama(), 10**6, False, (RequestShape(7, 6),), LIMITS)
    plan = plan_capacity(query)
    assert plan.step_time is None
    assert plan.decode_tokens_per_s is None
    assert plan.no_prediction == "no step model is given and no machine was measured"
    other_weights = dataclasses.replace(STEP_MODEL, c=None, weight_bytes=(5.0, 5.0))
    assert "fitted for 5 only" in str(plan_capacity(query, other_weights).no_prediction)
    tiny = plan_capacity(dataclasses.replace(query, memory=2 * 4 * 256), STEP_MODEL)
    assert (tiny.concurrent, tiny.concurrent_mean, tiny.step) == (0, 0, None)
    assert tiny.no_prediction == "not a single request of this mix fits"


def test_the_machine_gives_the_time_of_a_copy_and_says_where_bytes_do_not_decide() -> None:
    query = CapacityQuery(llama(), 10**6, False, (RequestShape(7, 6),), LIMITS, clients=6)
    machine = MachineLimits(1e9, dict.fromkeys(("float32", "bfloat16", "float16"), 2e9))
    plan = plan_capacity(query, machine=machine)
    assert plan.step is not None
    assert plan.step_time is not None
    assert plan.step_time.basis == "copy"
    assert plan.step_time.seconds * 1e9 == pytest.approx(plan.weight_bytes + plan.step.kv_bytes)
    # Six sequences use each weight of 4 bytes six times: 3 operations per byte, the ridge is 2.
    assert plan.step_time.arithmetic_bound == ("weights",)
    one = plan_capacity(dataclasses.replace(query, clients=1), STEP_MODEL, machine)
    assert one.step_time is not None
    assert (one.step_time.basis, one.step_time.arithmetic_bound) == ("fit", ())
    far = dataclasses.replace(STEP_MODEL, kv_bytes=(1e8, 1e9))
    extrapolated = plan_capacity(query, far, machine).step_time
    assert extrapolated is not None
    assert extrapolated.extrapolated
    assert not one.step_time.extrapolated
    computes = dataclasses.replace(STEP_MODEL, f=1e-9, flops=(1.0, plan.step.flops))
    within = plan_capacity(query, computes).step_time
    more = plan_capacity(dataclasses.replace(query, clients=7), computes).step_time
    assert within is not None
    assert more is not None
    assert (within.extrapolated, more.extrapolated) == (False, True)


def test_a_step_computes_with_every_weight_and_every_key() -> None:
    """By hand: 2 operations per weight and sequence; 2 on each key and value that a query head
    sees, for each of its dimensions."""
    layers = (HeadConfig(4, 2, 8), HeadConfig(4, 2, 8))
    model = llama(layers=layers)
    query = CapacityQuery(model, 10**6, False, (RequestShape(7, 6),), LIMITS, clients=3)
    plan = plan_capacity(query, dataclasses.replace(STEP_MODEL, f=1e-6))
    assert plan.step is not None
    weights = 2 * 3 * random_model(model, seed=0).num_parameters
    # Decode steps see 8 to 12 tokens.
    attention = 3 * 10 * 2 * (4 * 4 * 8)
    assert plan.step.flops == weights + attention
    assert plan.step_time is not None
    assert plan.step_time.parts["arithmetic"] == pytest.approx(1e-6 * (weights + attention))
    assert plan.step_time.seconds == pytest.approx(sum(plan.step_time.parts.values()))
    assert plan.step_time.bound_by == "arithmetic"


def test_every_wrong_field_of_a_query_is_named() -> None:
    mix = (RequestShape(0, 5), RequestShape(5, 1), RequestShape(5, 60), RequestShape(5, 5, 0))
    query = CapacityQuery(llama(), 0, False, mix, LIMITS, clients=0)
    with pytest.raises(InvalidRequestError) as caught:
        plan_capacity(query)
    named = [violation.field for violation in caught.value.violations]
    assert named == [
        "memory", "clients", "mix[0].prompt", "mix[1].output", "mix[2].output", "mix[3].share"
    ]  # fmt: skip
    with pytest.raises(InvalidRequestError, match="mix is 17 shapes; allowed: 1 to 16"):
        plan_capacity(dataclasses.replace(query, mix=mix[:1] * 17))


def test_measuring_a_machine_takes_seconds_and_says_how_far_it_is() -> None:
    from service.capacity import measure_machine

    seen: list[tuple[int, int]] = []
    limits = measure_machine(
        torch.device("cpu"), 2**20, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert limits.ridge("float32") == limits.flops_per_s["float32"] / limits.bytes_per_s
    assert MachineLimits.from_dict(limits.to_dict()) == limits
    with pytest.raises(ValueError, match="bytes_per_s is 0"):
        MachineLimits.from_dict(limits.to_dict() | {"bytes_per_s": 0})
    with pytest.raises(ValueError, match="flops_per_s is"):
        MachineLimits.from_dict(limits.to_dict() | {"flops_per_s": {"float32": 1.0}})


def test_what_heads_remember_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan asks for it for every token of every request; each caller gets a dict of its own."""
    from models import config

    made: list[object] = []
    retention = config.Retention

    def counted(window: int | None = None, sink_tokens: int = 0) -> config.Retention:
        made.append(window)
        return retention(window, sink_tokens)

    monkeypatch.setattr(config, "Retention", counted)
    heads = HeadConfig(64, 64, 8, window=777)
    heads.retentions.clear()
    for num_tokens in range(100):
        llama(layers=(heads, heads)).kv_bytes(num_tokens)
    assert heads.retentions == {retention(777): tuple(range(64))}
    # Windows of which no sequence grows out are told apart by the model, once for each layer.
    assert len(made) <= 64 + 2 * 100
