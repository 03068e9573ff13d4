"""Who runs when: budget, chunks, preemption, refusals, and one end for every request.

The model is a fake whose tokens depend on everything that the block tables lead to, so that any
mistake with blocks changes an output. Invariants are checked after every step.
"""

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.errors import NeverFitsError, QueueFullError
from service.engine.group_pool import BlockGroup
from service.engine.sampling_params import SamplingParams
from service.engine.sequence import FinishReason, Sequence, SequenceStatus
from tests.fakes import EOS, SchedulerLoop, continuation, scores


def greedy(
    max_tokens: int | None = None,
    *,
    min_tokens: int = 0,
    ignore_eos: bool = True,
    stop_token_ids: tuple[int, ...] = (),
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=0.0,
        ignore_eos=ignore_eos,
        stop_token_ids=stop_token_ids,
    )


def tokens(loop: SchedulerLoop, seq: Sequence) -> list[int]:
    return list(loop.result(seq).token_ids)


# Budget and chunks


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    loop = SchedulerLoop(max_num_batched_tokens=8)
    seq = loop.add(range(1, 21), greedy(3))
    loop.drain()
    assert [plan[seq.seq_id] for plan in loop.plans] == [8, 8, 4, 1, 1]
    assert tokens(loop, seq) == continuation(range(1, 21), 3)


def test_only_the_last_chunk_gives_a_token() -> None:
    loop = SchedulerLoop(max_num_batched_tokens=8)
    seq = loop.add(range(1, 21), greedy(3))
    loop.step()
    loop.step()
    assert loop.outputs[seq.seq_id] == []
    loop.step()
    assert len(loop.outputs[seq.seq_id]) == 1


def test_several_prompts_share_a_step() -> None:
    loop = SchedulerLoop(max_num_batched_tokens=10)
    for length in (3, 4, 5):
        loop.add([1] * length, greedy(2))
    assert loop.step() == {0: 3, 1: 4, 2: 3}
    assert loop.step() == {0: 1, 1: 1, 2: 2}


def test_running_sequences_decode_in_every_step_of_a_long_prefill() -> None:
    loop = SchedulerLoop(num_blocks=64, max_num_batched_tokens=8)
    decoding = [loop.add([index], greedy(40)) for index in (1, 2)]
    loop.step()
    long = loop.add(range(1, 61), greedy(2))
    for _ in range(10):
        assert loop.step() == {**{seq.seq_id: 1 for seq in decoding}, long.seq_id: 6}
    assert long.num_output_tokens == 1


def test_decodes_come_first_even_when_the_prefill_ranks_higher() -> None:
    loop = SchedulerLoop(max_num_batched_tokens=8)
    decoding = loop.add([1], greedy(20))
    loop.step()
    urgent = loop.add(range(1, 31), greedy(2), priority=9)
    loop.step()
    assert loop.scheduler.running == [urgent, decoding]
    plan = loop.scheduler.schedule()
    assert [(item.seq, item.num_tokens) for item in plan.scheduled] == [(decoding, 1), (urgent, 7)]


def test_sequences_with_one_token_stand_before_all_others_in_a_plan() -> None:
    loop = SchedulerLoop(max_num_batched_tokens=16)
    loop.add(range(1, 6), greedy(2))
    loop.add([1], greedy(2))
    loop.add([1, 2], greedy(2))
    plan = loop.scheduler.schedule()
    assert [item.num_tokens for item in plan.scheduled] == [1, 5, 2]
    assert plan.num_tokens == 8


def test_no_more_than_the_allowed_sequences_run() -> None:
    loop = SchedulerLoop(max_num_seqs=2)
    seqs = [loop.add([index], greedy(2)) for index in range(1, 6)]
    assert set(loop.step()) == {0, 1}
    loop.drain()
    assert max(len(plan) for plan in loop.plans) == 2
    for seq in seqs:
        assert tokens(loop, seq) == continuation([seq.seq_id + 1], 2)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=12),
    max_num_seqs=st.integers(1, 6),
    extra=st.integers(0, 20),
    num_blocks=st.integers(13, 30),
    caching=st.booleans(),
)
def test_every_plan_keeps_the_limits_and_decodes_whoever_can_decode(
    lengths: list[tuple[int, int]], max_num_seqs: int, extra: int, num_blocks: int, caching: bool
) -> None:
    loop = SchedulerLoop(
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + extra,
        enable_prefix_caching=caching,
    )
    seqs = [loop.add([1] * prompt, greedy(output)) for prompt, output in lengths]
    while loop.scheduler.has_unfinished:
        ready = [seq for seq in loop.scheduler.running if seq.num_uncomputed_tokens == 1]
        preempted_before = [seq.num_preemptions for seq in ready]
        scheduled = loop.step()
        assert 1 <= sum(scheduled.values()) <= max_num_seqs + extra
        assert len(scheduled) <= max_num_seqs
        for seq, before in zip(ready, preempted_before, strict=True):
            assert scheduled.get(seq.seq_id) == 1 or seq.num_preemptions > before
    for seq, (prompt, output) in zip(seqs, lengths, strict=True):
        assert tokens(loop, seq) == continuation([1] * prompt, output)


# Preemption


def crowded() -> SchedulerLoop:
    """Six blocks of four tokens."""
    return SchedulerLoop(num_blocks=6)


def test_preemption_takes_the_last_in_order_and_computes_it_again() -> None:
    loop = SchedulerLoop(num_blocks=8)
    low = loop.add(range(1, 8), greedy(10), priority=-1)
    loop.step()
    high = loop.add(range(11, 18), greedy(10), priority=1)
    middle = loop.add(range(21, 24), greedy(10))
    loop.step()
    assert loop.scheduler.running == [high, middle, low]
    while not loop.num_preempted:
        loop.step()
    assert loop.scheduler.running == [high, middle]
    loop.drain()
    assert low.num_preemptions > 0
    assert high.num_preemptions == 0
    assert loop.num_preempted == low.num_preemptions + middle.num_preemptions
    for seq, prompt in ((low, range(1, 8)), (high, range(11, 18)), (middle, range(21, 24))):
        assert tokens(loop, seq) == continuation(prompt, 10)


def test_among_equals_the_latest_arrival_is_preempted() -> None:
    loop = crowded()
    seqs = [loop.add([10 * index + 1] * 7, greedy(9)) for index in range(2)]
    loop.drain()
    assert [seq.num_preemptions > 0 for seq in seqs] == [False, True]


def test_the_earlier_deadline_is_spared() -> None:
    loop = crowded()
    relaxed = loop.add([1] * 7, greedy(9), deadline=100.0)
    urgent = loop.add([2] * 7, greedy(9), deadline=50.0)
    loop.drain()
    assert urgent.num_preemptions == 0
    assert relaxed.num_preemptions > 0


def test_a_preempted_sequence_keeps_its_tokens_and_repeats_none() -> None:
    loop = crowded()
    loop.add([1] * 7, greedy(12))
    victim = loop.add([2] * 7, greedy(12))
    while not victim.num_preemptions:
        loop.step()
    assert victim.status is SequenceStatus.WAITING
    assert victim.num_computed_tokens == 0
    assert victim.num_output_tokens > 0
    told = [token for output in loop.outputs[victim.seq_id] for token in output.token_ids]
    assert told == continuation([2] * 7, victim.num_output_tokens)
    loop.drain()
    assert tokens(loop, victim) == continuation([2] * 7, 12)


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    loop = crowded()
    first, victim = loop.add([1] * 7, greedy(12)), loop.add([2] * 7, greedy(12))
    loop.step()
    small = loop.add([3], greedy(1))
    while not victim.num_preemptions:
        scheduled = loop.step()
    assert set(scheduled) == {first.seq_id}
    assert set(loop.step()) == {first.seq_id, small.seq_id}


def test_a_sequence_can_preempt_itself_when_it_is_the_last() -> None:
    loop = crowded()
    loop.add([1] * 11, greedy(9))
    last = loop.add([2] * 7, greedy(3))
    loop.step()
    loop.step()
    assert loop.blocks.num_free_pages == 1, "and both need one more"
    assert loop.step() == {0: 1}
    loop.drain()
    assert last.num_preemptions == 1
    assert tokens(loop, last) == continuation([2] * 7, 3)


def test_scoring_that_is_preempted_reports_every_token_once() -> None:
    loop = SchedulerLoop(num_blocks=8, max_num_batched_tokens=4, max_num_seqs=4)
    loop.add([1] * 3, greedy(20))
    scored = loop.add(range(1, 25), None)
    loop.drain()
    assert scored.num_preemptions > 0
    assert list(loop.result(scored).prompt_logprobs) == scores(range(1, 25))


def test_the_lowest_priority_ends_under_endless_traffic_of_higher_priority() -> None:
    loop = SchedulerLoop(num_blocks=29, max_num_batched_tokens=4, max_num_seqs=2, max_bypass=5)
    prompt = [1] * 104
    low = loop.add(prompt, greedy(2), priority=-1)
    for step in range(200):
        if step % 9 == 0:
            loop.add([7] * 6, greedy(8), priority=1)
        loop.step()
    assert low.num_preemptions > 1, "without a fight the test says nothing"
    assert tokens(loop, low) == continuation(prompt, 2)


def test_a_small_request_passes_a_large_one_only_so_often() -> None:
    loop = SchedulerLoop(num_blocks=8, max_num_seqs=4, max_bypass=3)
    loop.add([1] * 4, greedy(25))
    large = loop.add([2] * 25, greedy(2))
    overtaking = 0
    while large.status is SequenceStatus.WAITING:
        small = loop.add([3], greedy(1))
        overtaking += small.seq_id in loop.step()
    assert overtaking == 3
    loop.drain()
    assert tokens(loop, large) == continuation([2] * 25, 2)


# What fits


def test_what_can_never_fit_is_refused_at_once() -> None:
    loop = crowded()
    with pytest.raises(NeverFitsError, match=r"25 tokens .* 24 in total"):
        loop.add([1] * 10, greedy(16))
    with pytest.raises(NeverFitsError):
        loop.add([1] * 25, None)
    assert not loop.scheduler.has_unfinished


@pytest.mark.parametrize(("prompt", "max_tokens"), [(10, 15), (1, 24), (24, 1)])
def test_what_fits_exactly_runs_to_its_end(prompt: int, max_tokens: int) -> None:
    loop = crowded()
    seq = loop.add([1] * prompt, greedy(max_tokens))
    loop.drain()
    assert loop.reason(seq) is FinishReason.LENGTH
    assert tokens(loop, seq) == continuation([1] * prompt, max_tokens)
    assert loop.num_preempted == 0


def test_a_scored_prompt_may_fill_the_whole_cache() -> None:
    loop = crowded()
    seq = loop.add([1] * 24, None)
    loop.drain()
    assert len(loop.result(seq).prompt_logprobs) == 23


def test_requests_that_fill_the_cache_alone_run_one_after_the_other() -> None:
    loop = crowded()
    seqs = [loop.add([index] * 12, greedy(13)) for index in range(1, 5)]
    loop.drain()
    for seq in seqs:
        assert tokens(loop, seq) == continuation([seq.seq_id + 1] * 12, 13)


def test_the_queue_refuses_more_requests_than_it_holds() -> None:
    loop = SchedulerLoop(max_num_seqs=1, max_waiting_requests=2)
    for _ in range(2):
        loop.add([1], greedy(5))
    with pytest.raises(QueueFullError, match="at most 2 waiting requests") as raised:
        loop.add([1], greedy(5))
    assert raised.value.unit == "requests"
    assert not loop.scheduler.has_room_for(1)
    loop.step()
    assert loop.scheduler.has_room_for(1)
    loop.add([1], greedy(5))


def test_the_queue_refuses_more_tokens_than_it_holds() -> None:
    loop = SchedulerLoop(max_num_seqs=1, max_waiting_tokens=10)
    loop.add([1] * 4, greedy(5))
    loop.add([1] * 6, greedy(5))
    assert loop.scheduler.num_waiting_tokens == 10
    assert not loop.scheduler.has_room_for(1)
    with pytest.raises(QueueFullError, match="at most 10 waiting tokens") as raised:
        loop.add([1], greedy(5))
    assert raised.value.unit == "tokens"
    loop.step()
    assert loop.scheduler.has_room_for(4)
    assert not loop.scheduler.has_room_for(5)


def test_an_empty_queue_takes_a_prompt_of_any_length_and_then_no_other() -> None:
    loop = SchedulerLoop(max_waiting_tokens=10)
    loop.add([1] * 11, None)
    with pytest.raises(QueueFullError, match="at most 10 waiting tokens"):
        loop.add([1], None)


def test_a_refused_request_leaves_the_others_alone() -> None:
    loop = SchedulerLoop(max_waiting_requests=1)
    seq = loop.add([5], greedy(4))
    for refused in (greedy(4), greedy(10_000)):
        with pytest.raises((QueueFullError, NeverFitsError)):
            loop.add([5], refused)
    loop.drain()
    assert tokens(loop, seq) == continuation([5], 4)


# Endings


def scripted(script: list[int | None], params: SamplingParams) -> tuple[FinishReason, object, int]:
    """Reason, matched stop and number of tokens of a request that the model answers so."""
    loop = SchedulerLoop()
    seq = loop.add([1, 2], params, script=script)
    loop.drain()
    finish = loop.result(seq).finish
    assert finish is not None
    return finish.reason, finish.matched_stop, len(tokens(loop, seq))


def test_the_end_of_sequence_token_ends() -> None:
    assert scripted([5, 6, EOS, 7], greedy(9, ignore_eos=False)) == (FinishReason.EOS, None, 3)


def test_the_end_of_sequence_token_can_be_ignored() -> None:
    assert scripted([EOS, 6, EOS, 7], greedy(4)) == (FinishReason.LENGTH, None, 4)


def test_a_stop_token_ends_and_is_part_of_the_output() -> None:
    params = greedy(9, stop_token_ids=(7, 8))
    assert scripted([5, 8, 7], params) == (FinishReason.STOP, 8, 2)


def test_a_stop_token_that_is_also_end_of_sequence_is_a_stop() -> None:
    params = greedy(9, ignore_eos=False, stop_token_ids=(EOS,))
    assert scripted([5, EOS], params) == (FinishReason.STOP, EOS, 2)


def test_max_tokens_end() -> None:
    assert scripted([5, 6, 7], greedy(3)) == (FinishReason.LENGTH, None, 3)


def test_an_end_at_the_last_allowed_token_is_named_by_its_cause() -> None:
    assert scripted([5, EOS], greedy(2, ignore_eos=False)) == (FinishReason.EOS, None, 2)
    assert scripted([5, 6], greedy(2, stop_token_ids=(6,))) == (FinishReason.STOP, 6, 2)


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("ending", ["eos", "stop"])
def test_nothing_ends_before_min_tokens(min_tokens: int, ending: str) -> None:
    params = greedy(
        9,
        min_tokens=min_tokens,
        ignore_eos=ending != "eos",
        stop_token_ids=() if ending == "eos" else (7,),
    )
    token_id = EOS if ending == "eos" else 7
    assert scripted([token_id] * 9, params)[2] == max(min_tokens, 1)


def test_logits_that_are_not_finite_end_with_an_error_and_no_token() -> None:
    assert scripted([5, None], greedy(9)) == (FinishReason.ERROR, None, 1)
    assert scripted([None], greedy(9)) == (FinishReason.ERROR, None, 0)


def test_an_error_of_one_request_leaves_the_others_alone() -> None:
    loop = SchedulerLoop()
    before, broken, after = (
        loop.add([1, 2], greedy(6)),
        loop.add([3, 4], greedy(6), script=[5, None]),
        loop.add([5, 6], greedy(6)),
    )
    loop.drain()
    assert loop.reason(broken) is FinishReason.ERROR
    assert tokens(loop, before) == continuation([1, 2], 6)
    assert tokens(loop, after) == continuation([5, 6], 6)


@pytest.mark.parametrize("params", [greedy(3), None], ids=["generating", "scoring"])
def test_a_failure_in_the_middle_of_a_prompt_frees_its_blocks_and_caches_nothing(
    params: SamplingParams | None,
) -> None:
    loop = SchedulerLoop(max_num_batched_tokens=8, enable_prefix_caching=True)
    broken = loop.add(range(1, 21), params)
    loop.step()
    loop.runner.failing.add(broken.seq_id)
    assert loop.step() == {broken.seq_id: 8}
    assert loop.reason(broken) is FinishReason.ERROR
    assert loop.blocks.num_used_pages == 0
    assert loop.blocks.num_cached_pages == 2, "those of the step before"
    again = loop.add(range(1, 21), greedy(3))
    loop.drain()
    assert again.num_cached_tokens == 8
    assert tokens(loop, again) == continuation(range(1, 21), 3)


def test_a_stop_matcher_sees_every_token_and_ends_with_the_one_that_completes_a_stop() -> None:
    loop = SchedulerLoop()
    seen: list[int] = []

    def match(token_id: int) -> str | None:
        seen.append(token_id)
        return "stop" if len(seen) == 3 else None

    seq = loop.add([1, 2], greedy(9), match_stop=match)
    loop.drain()
    finish = loop.result(seq).finish
    assert finish is not None
    assert (finish.reason, finish.matched_stop) == (FinishReason.STOP, "stop")
    assert tokens(loop, seq) == seen == continuation([1, 2], 3)


def test_a_stop_matcher_sees_no_token_twice_when_its_sequence_is_preempted() -> None:
    loop = crowded()
    loop.add([1] * 7, greedy(12))
    seen: list[int] = []

    def match(token_id: int) -> str | None:
        seen.append(token_id)
        return None

    victim = loop.add([2] * 7, greedy(12), match_stop=match)
    loop.drain()
    assert victim.num_preemptions > 0
    assert seen == continuation([2] * 7, 12)


def test_a_full_context_ends_a_generation_without_max_tokens() -> None:
    loop = SchedulerLoop(max_model_len=20)
    seq = loop.add([1] * 5, greedy())
    loop.drain()
    assert loop.reason(seq) is FinishReason.CONTEXT_FULL
    assert tokens(loop, seq) == continuation([1] * 5, 15)


def test_a_full_cache_is_a_full_context() -> None:
    loop = crowded()
    seq = loop.add([1] * 5, greedy())
    other = loop.add([2] * 5, greedy())
    loop.drain()
    for each, prompt in ((seq, [1] * 5), (other, [2] * 5)):
        assert loop.reason(each) is FinishReason.CONTEXT_FULL
        # All 24 slots, and one token that is never read back.
        assert tokens(loop, each) == continuation(prompt, 25 - 5)


def test_max_tokens_that_reach_the_end_of_the_context_are_a_length() -> None:
    loop = SchedulerLoop(max_model_len=20)
    seq = loop.add([1] * 5, greedy(15))
    loop.drain()
    assert loop.reason(seq) is FinishReason.LENGTH


# Scoring


@pytest.mark.parametrize("budget", [2, 3, 8, 64])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 20])
def test_scoring_reports_every_token_after_the_first_in_any_chunks(
    budget: int, num_tokens: int
) -> None:
    loop = SchedulerLoop(max_num_batched_tokens=budget, max_num_seqs=2)
    prompt = list(range(1, num_tokens + 1))
    seq = loop.add(prompt, None)
    loop.drain()
    result = loop.result(seq)
    assert result.token_ids == ()
    assert list(result.prompt_logprobs) == scores(prompt)
    assert loop.reason(seq) is FinishReason.LENGTH
    assert len(loop.plans) == -(-num_tokens // budget)


def test_scoring_and_generation_share_steps_and_prefixes() -> None:
    loop = SchedulerLoop(enable_prefix_caching=True)
    prompt = list(range(1, 14))
    first = loop.add(prompt, greedy(3))
    loop.drain()
    scored, again = loop.add(prompt, None), loop.add(prompt, greedy(3))
    loop.drain()
    assert list(loop.result(scored).prompt_logprobs) == scores(prompt)
    assert tokens(loop, first) == tokens(loop, again) == continuation(prompt, 3)
    assert (first.num_cached_tokens, scored.num_cached_tokens) == (0, 0)
    assert again.num_cached_tokens == 12


# Aborts and deadlines, at every stage

Prepare = Callable[[SchedulerLoop, float | None], Sequence]


def waiting(loop: SchedulerLoop, deadline: float | None) -> Sequence:
    loop.add([9], greedy(30), priority=5)
    loop.step()
    seq = loop.add([1] * 20, greedy(9), deadline=deadline)
    assert seq.status is SequenceStatus.WAITING
    return seq


def waiting_again(loop: SchedulerLoop, deadline: float | None) -> Sequence:
    seq = loop.add([1] * 7, greedy(30), deadline=deadline)
    loop.step()
    loop.add([9] * 17, greedy(30), priority=5)
    while seq.status is not SequenceStatus.WAITING:
        loop.step()
    assert seq.num_preemptions == 1
    return seq


def mid_prefill(loop: SchedulerLoop, deadline: float | None) -> Sequence:
    seq = loop.add([1] * 20, greedy(9), deadline=deadline)
    loop.step()
    assert 0 < seq.num_computed_tokens < 20
    return seq


def mid_scoring(loop: SchedulerLoop, deadline: float | None) -> Sequence:
    seq = loop.add([1] * 20, None, deadline=deadline)
    loop.step()
    assert 0 < len(seq.prompt_logprobs) < 19
    return seq


def decoding(loop: SchedulerLoop, deadline: float | None) -> Sequence:
    seq = loop.add([1] * 5, greedy(9), deadline=deadline)
    for _ in range(4):
        loop.step()
    assert 0 < seq.num_output_tokens < 9
    return seq


STAGES = [waiting, waiting_again, mid_prefill, mid_scoring, decoding]


def small_loop(prepare: Prepare) -> SchedulerLoop:
    """One sequence at a time, or, to be preempted, two."""
    max_num_seqs = 2 if prepare is waiting_again else 1
    return SchedulerLoop(num_blocks=13, max_num_batched_tokens=8, max_num_seqs=max_num_seqs)


@pytest.mark.parametrize("prepare", STAGES)
def test_an_abort_frees_blocks_at_once_and_ends_once(prepare: Prepare) -> None:
    loop = small_loop(prepare)
    seq = prepare(loop, None)
    held, used = sum(map(len, seq.block_tables)), loop.blocks.num_used_pages
    loop.abort(seq)
    assert loop.blocks.num_used_pages == used - held
    assert seq.block_tables == []
    told = loop.result(seq).token_ids
    assert loop.reason(seq) is FinishReason.CANCELLED
    loop.abort(seq)
    loop.drain()
    assert loop.num_finishes(seq) == 1, "an abort after the end changes nothing"
    assert loop.result(seq).token_ids == told
    assert loop.blocks.num_used_pages == 0


def test_an_abort_after_the_last_token_changes_nothing() -> None:
    loop = SchedulerLoop()
    seq = loop.add([1], greedy(2))
    loop.step()
    loop.step()
    assert loop.reason(seq) is FinishReason.LENGTH
    assert loop.scheduler.abort(seq.seq_id, FinishReason.CANCELLED) is None
    assert loop.blocks.num_used_pages == 0


def test_an_unknown_request_cannot_be_aborted() -> None:
    assert SchedulerLoop().scheduler.abort(77, FinishReason.CANCELLED) is None


def test_aborting_all_ends_whatever_waits_and_runs() -> None:
    loop = SchedulerLoop(max_num_seqs=2)
    seqs = [loop.add([1] * 5, greedy(9)) for _ in range(4)]
    loop.step()
    outputs = loop.scheduler.abort_all(FinishReason.CANCELLED)
    assert sorted(output.seq_id for output in outputs) == [seq.seq_id for seq in seqs]
    assert {output.finish.reason for output in outputs if output.finish} == {FinishReason.CANCELLED}
    assert not loop.scheduler.has_unfinished
    assert loop.blocks.num_used_pages == 0
    loop.scheduler.check_integrity()
    assert loop.step() == {}


@pytest.mark.parametrize("prepare", STAGES)
def test_a_deadline_ends_a_request_at_any_stage_before_it_runs_again(prepare: Prepare) -> None:
    loop = small_loop(prepare)
    seq = prepare(loop, 5.0)
    told = sum(len(output.token_ids) for output in loop.outputs[seq.seq_id])
    loop.clock.advance(5.0)
    scheduled = loop.step()
    assert seq.seq_id not in scheduled
    assert loop.reason(seq) is FinishReason.DEADLINE
    assert seq.block_tables == []
    assert len(tokens(loop, seq)) == told
    loop.drain()
    assert loop.num_finishes(seq) == 1


def test_nobody_is_ended_before_the_deadline() -> None:
    loop = SchedulerLoop()
    seq = loop.add([1], greedy(2), deadline=5.0)
    loop.clock.advance(4.999)
    loop.drain()
    assert loop.reason(seq) is FinishReason.LENGTH


def test_each_of_several_is_ended_at_its_own_deadline() -> None:
    loop = SchedulerLoop()
    deadlines = [7.0, 3.0, 5.0, None, 3.0]
    seqs = [loop.add([1], greedy(90), deadline=deadline) for deadline in deadlines]
    for now in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0):
        loop.clock.advance(1.0)
        loop.step()
        for seq, deadline in zip(seqs, deadlines, strict=True):
            has_ended = seq.status is SequenceStatus.FINISHED
            assert has_ended == (deadline is not None and deadline <= now), (now, deadline)


def test_blocks_of_the_expired_are_there_for_others_in_the_same_step() -> None:
    loop = crowded()
    expiring = loop.add([1] * 20, greedy(3), deadline=5.0)
    loop.step()
    following = loop.add([2] * 20, greedy(3))
    loop.step()
    assert following.status is SequenceStatus.WAITING
    loop.clock.advance(5.0)
    assert set(loop.step()) == {following.seq_id}
    assert loop.reason(expiring) is FinishReason.DEADLINE


def test_every_finish_reason_is_reached() -> None:
    loop = SchedulerLoop(max_model_len=12)
    seqs = {
        FinishReason.EOS: loop.add([1], greedy(ignore_eos=False), script=[EOS]),
        FinishReason.STOP: loop.add([1], greedy(stop_token_ids=(5,)), script=[5]),
        FinishReason.LENGTH: loop.add([1], greedy(1)),
        FinishReason.CONTEXT_FULL: loop.add([1], greedy()),
        FinishReason.DEADLINE: loop.add([1], greedy(), deadline=1.0),
        FinishReason.CANCELLED: loop.add([1], greedy()),
        FinishReason.ERROR: loop.add([1], greedy(), script=[None]),
    }
    assert set(seqs) == set(FinishReason)
    loop.step()
    loop.abort(seqs[FinishReason.CANCELLED])
    loop.clock.advance(1.0)
    loop.drain()
    for reason, seq in seqs.items():
        assert loop.reason(seq) is reason


# What is told at the end


def test_usage_and_timings_follow_the_clock() -> None:
    loop = SchedulerLoop(max_num_seqs=1, max_num_batched_tokens=4)
    first = loop.add([1], greedy(1))
    seq = loop.add([2] * 6, greedy(2))
    loop.clock.advance(1.0)
    loop.step()
    assert loop.reason(first) is FinishReason.LENGTH
    loop.clock.advance(2.0)
    loop.step()
    loop.clock.advance(4.0)
    loop.step()
    loop.clock.advance(8.0)
    loop.step()
    finish = loop.result(seq).finish
    assert finish is not None
    assert dataclasses.astuple(finish.usage) == (6, 2, 0)
    assert dataclasses.astuple(finish.timings) == (3.0, 4.0, 7.0, 15.0)


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    loop = SchedulerLoop(num_blocks=6, enable_prefix_caching=True)
    loop.add([1] * 7, greedy(12))
    victim = loop.add([2] * 7, greedy(12))
    loop.drain()
    assert victim.num_preemptions > 0
    finish = loop.result(victim).finish
    assert finish is not None
    assert finish.usage.cached_tokens == 0, "what preemption finds again is no saving"


# A rotation that changes with the length of the sequence


@pytest.mark.parametrize("num_prompt", [1, 5, 12, 13, 20])
def test_a_sequence_is_computed_again_once_when_it_grows_beyond_the_switch(num_prompt: int) -> None:
    loop = SchedulerLoop(rope_switch_length=12)
    seq = loop.add(range(1, num_prompt + 1), greedy(20))
    beside = loop.add([3, 3], greedy(5))
    loop.drain()
    assert tokens(loop, seq) == continuation(range(1, num_prompt + 1), 20)
    assert tokens(loop, beside) == continuation([3, 3], 5)
    computed = [plan.get(seq.seq_id, 0) for plan in loop.plans]
    crosses = num_prompt <= 12 < num_prompt + 19
    assert sum(computed) == num_prompt + 19 + (12 if crosses else 0)
    assert computed.count(13) == (1 if crosses else 0) + (num_prompt == 13)
    assert seq.num_preemptions == (1 if crosses else 0)
    assert seq.min_rope_length == (13 if crosses else num_prompt)
    assert beside.num_preemptions == 0
    assert loop.num_preempted == 0, "it gives its blocks back by itself"


def test_a_sequence_that_ends_at_the_switch_is_not_computed_again() -> None:
    loop = SchedulerLoop(rope_switch_length=12)
    seq = loop.add([1] * 10, greedy(3))
    loop.drain()
    assert len(tokens(loop, seq)) == 3
    assert seq.num_preemptions == 0


# Windows


WINDOWS = (BlockGroup(), BlockGroup(window=6, sink_tokens=2, blocks_per_page=3))


def test_windows_let_a_pool_serve_more_than_it_holds() -> None:
    groups = (BlockGroup(window=6),)
    loop = SchedulerLoop(num_blocks=4, groups=groups, max_num_batched_tokens=8)
    seq = loop.add([1] * 30, greedy(60))
    loop.drain()
    assert tokens(loop, seq) == continuation([1] * 30, 60, groups)


def test_sequences_of_two_groups_are_preempted_and_go_on() -> None:
    loop = SchedulerLoop(num_blocks=12, groups=WINDOWS, max_num_batched_tokens=8)
    seqs = [loop.add([number] * (3 + number), greedy(25)) for number in range(5)]
    loop.drain()
    for number, seq in enumerate(seqs):
        assert tokens(loop, seq) == continuation([number] * (3 + number), 25, WINDOWS)
    assert loop.num_preempted > 0
    assert loop.blocks.num_used_pages == 0
