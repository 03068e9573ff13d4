"""A request's own state: counts, order, random numbers, and exactly one end."""

import pytest

from service.engine.sampling_params import SamplingParams
from service.engine.sequence import (
    FinishReason,
    Sequence,
    SequenceOutput,
    SequenceStatus,
    Timings,
    TokenLogprobs,
    Usage,
)


def make(
    num_tokens: int = 3,
    params: SamplingParams | None = None,
    *,
    seq_id: int = 0,
    priority: int = 0,
    deadline: float | None = None,
) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        token_ids=list(range(num_tokens)),
        params=params,
        arrival_time=10.0,
        priority=priority,
        deadline=deadline,
    )


def test_output_tokens_are_counted_apart_from_the_prompt() -> None:
    seq = make(3, SamplingParams())
    seq.token_ids += [7, 8]
    seq.num_computed_tokens = 4
    assert seq.num_prompt_tokens == 3
    assert seq.num_output_tokens == 2
    assert seq.num_tokens == 5
    assert seq.num_uncomputed_tokens == 1


def test_order_is_priority_then_deadline_then_arrival() -> None:
    expected = [
        make(seq_id=9, priority=2, deadline=50.0),
        make(seq_id=3, priority=1, deadline=20.0),
        make(seq_id=2, priority=1, deadline=30.0),
        make(seq_id=1, priority=1, deadline=None),
        make(seq_id=4, priority=1, deadline=None),
        make(seq_id=0, priority=-1, deadline=5.0),
    ]
    by_arrival = sorted(expected, key=lambda seq: seq.seq_id)
    assert sorted(by_arrival, key=lambda seq: seq.order) == expected


def draws(seed: int | None) -> list[float]:
    rng = make(params=SamplingParams(seed=seed)).rng
    assert rng is not None
    return [rng.random() for _ in range(5)]


def test_equal_seeds_draw_equal_numbers() -> None:
    assert draws(2**64 - 1) == draws(2**64 - 1)
    assert draws(1) != draws(2)


def test_without_a_seed_every_request_draws_its_own_numbers() -> None:
    assert draws(None) != draws(None)


def test_greedy_and_scoring_draw_no_numbers() -> None:
    assert make(params=SamplingParams(temperature=0.0)).rng is None
    assert make(params=None).rng is None


def test_a_finish_tells_usage_and_timings() -> None:
    seq = make(3, SamplingParams())
    seq.first_scheduled_time = 11.0
    seq.first_token_time = 13.5
    seq.num_cached_tokens = 2
    seq.token_ids += [7, 8]
    finish = seq.finish(FinishReason.STOP, 20.0, "stop")
    assert seq.status is SequenceStatus.FINISHED
    assert finish.reason is FinishReason.STOP
    assert finish.matched_stop == "stop"
    assert finish.usage == Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=2)
    assert finish.timings == Timings(queue=1.0, prefill=2.5, first_token=3.5, total=10.0)


def test_what_never_happened_is_as_long_as_the_request_lived() -> None:
    waited = make().finish(FinishReason.DEADLINE, 14.0).timings
    assert (waited.queue, waited.first_token, waited.total) == (4.0, 4.0, 4.0)
    seq = make()
    seq.first_scheduled_time = 11.0
    prefilled = seq.finish(FinishReason.DEADLINE, 14.0).timings
    assert prefilled == Timings(queue=1.0, prefill=3.0, first_token=4.0, total=4.0)


def test_a_sequence_ends_once() -> None:
    seq = make()
    seq.finish(FinishReason.EOS, 11.0)
    with pytest.raises(AssertionError, match="ends once"):
        seq.finish(FinishReason.CANCELLED, 12.0)


def test_merging_one_output_changes_nothing() -> None:
    output = SequenceOutput(4, (1,))
    assert SequenceOutput.merge([output]) is output


def test_merged_outputs_carry_everything_in_order() -> None:
    finish = make().finish(FinishReason.LENGTH, 11.0)
    first, second = TokenLogprobs(-0.5, ((1, -0.5),)), TokenLogprobs(-0.7, ())
    merged = SequenceOutput.merge(
        [
            SequenceOutput(4, (1,), (first,), (-1.0,)),
            SequenceOutput(4, (2,), (second,), (-2.0, -3.0)),
            SequenceOutput(4, finish=finish),
        ]
    )
    assert merged == SequenceOutput(4, (1, 2), (first, second), (-1.0, -2.0, -3.0), finish=finish)
