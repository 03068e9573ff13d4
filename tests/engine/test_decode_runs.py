"""Steps that go on with the decodes of the step before are those made from nothing."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.config import HeadConfig
from models.transformer import Transformer
from service.engine.batch import Batch
from service.engine.config import EngineConfig
from service.engine.decode_run import DecodeRun
from service.engine.engine import Engine, EngineRequest
from service.engine.model_runner import ModelRunner
from service.engine.plan import StepPlan
from service.engine.sequence import FinishReason
from service.engine.stats import StepStats
from tests.engine.tiny import CONFIG, ROPE, greedy
from tests.fakes import FakeClock, SchedulerLoop, continuation
from tests.models import tiny

PLAIN = HeadConfig(4, 2, 8, rope=ROPE)
WINDOWS = replace(PLAIN, window=(6, 6, None, None), sink_tokens=2)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {},
    {"stop_token_ids": tuple(range(40))},
    {"stop_token_ids": tuple(range(30)), "min_tokens": 9},
    {"logprobs": 2},
    {"temperature": 1.0, "seed": 3},
    {"repetition_penalty": 1.4},
    {"ignore_eos": False},
)


def life(model: Transformer, config: EngineConfig, seed: int) -> tuple[list[Any], list[Any]]:
    """Requests come, are late and cancelled by chance: outputs, and what listeners are told."""
    rng, clock = random.Random(seed), FakeClock()
    steps: list[StepStats] = []
    engine = Engine(model, config, clock=clock, on_step=steps.append)
    outputs: list[Any] = []
    ids: list[int] = []
    while len(ids) < 14 or engine.has_unfinished:
        if len(ids) < 14 and rng.random() < 0.15:
            prompt = [rng.randrange(40) for _ in range(rng.randrange(1, 12))]
            params = greedy(rng.randrange(9, 30), **rng.choice(SETTINGS))
            late = rng.random() < 0.1
            ids.append(engine.add(EngineRequest(prompt, params, timeout=20.0 if late else None)))
        if ids and rng.random() < 0.02:
            outputs.append(engine.abort(rng.choice(ids)))
        clock.advance(1.0)
        if engine.has_unfinished:
            outputs.extend(engine.step())
            engine.scheduler.check_integrity()
    told = [
        (
            step.num_tokens, step.num_sequences, step.num_preempted, step.kv_bytes, step.load,
            step.progress.prompts, step.progress.token_gaps,
        )
        for step in steps
    ]  # fmt: skip
    return outputs, told


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps there were that went on, and how many of them were recorded as a whole."""
    counts = [0, 0]

    def counting(index: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = function(*args)
            counts[index] += result is not None
            return result

        return call

    monkeypatch.setattr(DecodeRun, "go_on", counting(0, DecodeRun.go_on))
    monkeypatch.setattr(DecodeRun, "record", counting(1, DecodeRun.record))
    return counts


@pytest.mark.parametrize("kernel", ["auto", "dense"])
@pytest.mark.parametrize("layers", [(PLAIN,), (PLAIN, WINDOWS)], ids=["plain", "windows"])
@pytest.mark.parametrize("caching", [False, True])
def test_random_lives_are_those_without_any_going_on(
    kernel: Any,
    layers: tuple[HeadConfig, ...],
    caching: bool,
    counted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And every batch that is kept is the one that would be built from nothing."""
    model = tiny.model(
        CONFIG.replace(layers=layers, vocab_size=61, eos_token_ids=(5,)), kernel=kernel
    )
    build = ModelRunner._build_batch

    def compared(self: ModelRunner, plan: StepPlan) -> Batch:
        kept, anew = build(self, plan), Batch(plan, self.kv_cache)
        assert torch.equal(kept.input_ids, anew.input_ids)
        assert torch.equal(kept.positions, anew.positions)
        for ours, theirs in zip(kept.metadata.groups, anew.metadata.groups, strict=True):
            assert torch.equal(ours.slot_mapping, theirs.slot_mapping)
            tables, expected = ours.block_tables, theirs.block_tables
            assert torch.equal(tables.block_tables, expected.block_tables)
            assert torch.equal(tables.query_start, expected.query_start)
            assert torch.equal(tables.num_computed, expected.num_computed)
            assert ours.max_length == theirs.max_length
        return kept

    lives = []
    for seed in range(5):
        config = EngineConfig(
            num_blocks=14 + 2 * seed,
            block_size=4,
            max_num_seqs=4,
            max_num_batched_tokens=16,
            max_model_len=48,
            enable_prefix_caching=caching,
        )
        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "_build_batch", compared)
            lives.append((config, seed, life(model, config, seed)))
    went_on, recorded = counted
    assert went_on > recorded > 100
    assert sum(step[2] for _, _, (_, told) in lives for step in told) > 0, "some are preempted"
    monkeypatch.setattr(DecodeRun, "go_on", lambda self, expired: None)
    for config, seed, found in lives:
        assert found == life(model, config, seed)


def steps_of(loop: SchedulerLoop, count: int) -> list[bool]:
    """Of so many steps, whether each went on with the decodes of the one before."""
    went_on: list[bool] = []
    schedule = loop.scheduler.schedule

    def recorded() -> StepPlan:
        plan = schedule()
        went_on.append(plan.changed is not None)
        return plan

    loop.scheduler.schedule = recorded  # type: ignore[method-assign]
    for _ in range(count):
        loop.step()
    loop.scheduler.schedule = schedule  # type: ignore[method-assign]
    return went_on


def test_decodes_go_on_until_one_ends_or_another_comes() -> None:
    loop = SchedulerLoop()
    first, second = loop.add([1, 2], greedy(30)), loop.add([3], greedy(5))
    assert steps_of(loop, 6) == [False, False, True, True, True, False]
    assert loop.reason(second) is FinishReason.LENGTH
    loop.add([4, 5], greedy(30))
    assert steps_of(loop, 4) == [False, False, True, True]
    loop.abort(first)
    assert steps_of(loop, 2) == [False, True]


def test_who_waits_for_a_place_keeps_nobody_from_going_on() -> None:
    loop = SchedulerLoop(max_num_seqs=1)
    loop.add([1, 2], greedy(4))
    waits = loop.add([2], greedy(4))
    assert steps_of(loop, 5) == [False, False, True, True, False]
    loop.drain()
    assert list(loop.result(waits).token_ids) == continuation([2], 4)


def test_who_waits_for_blocks_is_looked_at_in_each_step() -> None:
    loop = SchedulerLoop(num_blocks=4, block_size=4)
    loop.add([1] * 5, greedy(7))
    loop.add([2] * 12, greedy(2))
    assert steps_of(loop, 4) == [False] * 4


def test_a_deadline_of_somebody_else_changes_nothing() -> None:
    loop = SchedulerLoop(max_num_seqs=1)
    loop.add([1, 2], greedy(9), priority=1)
    late = loop.add([2], greedy(4), deadline=10.0)
    assert steps_of(loop, 3) == [False, False, True]
    loop.clock.advance(10.0)
    assert steps_of(loop, 1) == [True]
    assert loop.reason(late) is FinishReason.DEADLINE


def test_a_step_that_was_not_recorded_is_not_gone_on_with() -> None:
    loop = SchedulerLoop()
    loop.add([1], greedy(9))
    loop.step()
    loop.scheduler.schedule()
    with pytest.raises(AssertionError, match="is not recorded"):
        loop.scheduler.schedule()


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("stops_early", [False, True])
def test_stop_strings_are_told_each_token(length: int, stops_early: bool) -> None:
    loop = SchedulerLoop()
    told: list[int] = []

    def match(token_id: int) -> str | None:
        told.append(token_id)
        return "stop" if stops_early and len(told) == length else None

    seq = loop.add([1], greedy(9), match_stop=match)
    loop.drain()
    assert told == continuation([1], length if stops_early else 9)
    assert loop.reason(seq) is (FinishReason.STOP if stops_early else FinishReason.LENGTH)


@pytest.mark.parametrize("switch", [3, 4, 5, 9])
def test_a_sequence_is_computed_again_at_the_switch_of_its_rotation(switch: int) -> None:
    loop = SchedulerLoop(rope_switch_length=switch)
    seq = loop.add([1, 2], greedy(12))
    loop.drain()
    assert seq.num_preemptions == 1
    assert seq.min_rope_length == switch + 1
