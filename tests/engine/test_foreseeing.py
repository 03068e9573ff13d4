"""Steps that run before the tokens of the one before are recorded: when, and for whom."""

import pytest

from service.engine.sampling_params import SamplingParams
from service.engine.sequence import FinishReason
from tests.fakes import GREEDY, SchedulerLoop, continuation


def greedy(max_tokens: int | None, **changes: object) -> SamplingParams:
    fields = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **changes}
    return SamplingParams(**fields)  # type: ignore[arg-type]


def loop(**limits: int) -> SchedulerLoop:
    return SchedulerLoop(foresees=True, **limits)  # type: ignore[arg-type]


def test_after_a_prompt_all_steps_are_foreseen() -> None:
    ahead = loop()
    seqs = [ahead.add(prompt, greedy(6)) for prompt in ([1, 2, 3], [4])]
    ahead.drain()
    assert [len(plan) for plan in ahead.plans] == [2] * 6
    assert ahead.num_foreseen == 5
    for seq, prompt in zip(seqs, ([1, 2, 3], [4]), strict=True):
        assert list(ahead.result(seq).token_ids) == continuation(prompt, 6)


def test_a_prompt_in_pieces_is_waited_for() -> None:
    ahead = loop(max_num_batched_tokens=4, max_num_seqs=2)
    ahead.add([1] * 11, greedy(3))
    ahead.drain()
    assert ahead.plans == [{0: 4}, {0: 4}, {0: 3}, {0: 1}, {0: 1}]
    assert ahead.num_foreseen == 2


def test_nothing_is_computed_for_who_surely_ends() -> None:
    ahead = loop()
    ahead.add([1], greedy(2))
    ahead.add([2], greedy(4))
    ahead.drain()
    assert ahead.plans == [{0: 1, 1: 1}] * 2 + [{1: 1}] * 2
    full = loop(max_model_len=4)
    full.add([1, 2], greedy(None))
    full.drain()
    assert full.plans == [{0: 2}, {0: 1}]


def test_an_end_is_seen_one_step_late_and_its_blocks_are_free_at_once() -> None:
    ahead = loop()
    ends = ahead.add([1], greedy(50, stop_token_ids=(9,)), script=[5, 9])
    goes_on = ahead.add([2], greedy(5))
    for _ in range(2):
        ahead.step()
    assert ahead.reason(ends) is FinishReason.STOP
    assert ahead.result(ends).token_ids == (5, 9)
    assert ahead.blocks.num_used_pages == len(goes_on.block_tables[0])
    assert ahead.step() == {ends.seq_id: 1, goes_on.seq_id: 1}, "once in vain"
    assert ahead.step() == {goes_on.seq_id: 1}
    ahead.drain()
    assert ahead.num_finishes(ends) == 1
    assert list(ahead.result(goes_on).token_ids) == continuation([2], 5)


def test_what_runs_for_nobody_is_forgotten() -> None:
    ahead = loop()
    gone = ahead.add([1], greedy(50))
    ahead.step()
    ahead.abort(gone)
    follows = ahead.add([2], greedy(2))
    assert ahead.step() == {follows.seq_id: 1}
    ahead.drain()
    assert list(ahead.result(follows).token_ids) == continuation([2], 2)


def test_a_newcomer_waits_for_the_step_that_runs_and_no_longer() -> None:
    ahead = loop()
    first = ahead.add([1], greedy(50))
    for _ in range(3):
        ahead.step()
    late = ahead.add([2], greedy(2))
    assert ahead.step() == {first.seq_id: 1}
    assert ahead.step() == {first.seq_id: 1, late.seq_id: 1}


def test_who_finds_no_room_does_not_keep_the_others_waiting() -> None:
    ahead = loop(max_num_seqs=1)
    ahead.add([1], greedy(4))
    waits = ahead.add([2], greedy(3))
    ahead.drain()
    assert ahead.num_foreseen == 3 + 2
    assert list(ahead.result(waits).token_ids) == continuation([2], 3)


def test_prompts_that_no_step_had_room_for_are_admitted_next() -> None:
    ahead = loop(max_num_batched_tokens=4, max_num_seqs=3)
    for token in range(3):
        ahead.add([token] * 2, greedy(6))
    assert ahead.step() == {0: 2, 1: 2}
    assert ahead.step() == {0: 1, 1: 1, 2: 2}


def test_a_deadline_is_looked_at_before_each_step() -> None:
    ahead = loop()
    late = ahead.add([1], greedy(50), deadline=10.0)
    other = ahead.add([2], greedy(50))
    for _ in range(2):
        ahead.step()
    ahead.clock.advance(10.0)
    ahead.step()
    assert ahead.num_finishes(late) == 0, "it runs"
    assert ahead.step() == {other.seq_id: 1}
    assert ahead.reason(late) is FinishReason.DEADLINE
    assert len(ahead.result(late).token_ids) == 3


@pytest.mark.parametrize(
    "penalty",
    [{"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}],
)
def test_where_a_token_depends_on_the_one_before_it_is_waited_for(
    penalty: dict[str, float],
) -> None:
    ahead = loop()
    ahead.add([1], greedy(4, **penalty))
    ahead.drain()
    assert ahead.num_foreseen == 0


def test_a_failure_ends_a_request_once() -> None:
    ahead = loop()
    fails = ahead.add([1], GREEDY, script=[3, None])
    mate = ahead.add([2], greedy(4))
    ahead.drain()
    assert ahead.reason(fails) is FinishReason.ERROR
    assert ahead.result(fails).token_ids == (3,)
    assert list(ahead.result(mate).token_ids) == continuation([2], 4)


def test_without_blocks_for_the_next_step_it_is_planned_when_tokens_are_known() -> None:
    ahead = loop(num_blocks=4, block_size=2, max_num_seqs=2)
    seqs = [ahead.add([token, token], greedy(5)) for token in (1, 2)]
    ahead.drain()
    assert ahead.num_preempted >= 1
    for seq, token in zip(seqs, (1, 2), strict=True):
        assert list(ahead.result(seq).token_ids) == continuation([token, token], 5)
