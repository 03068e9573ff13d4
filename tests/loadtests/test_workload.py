"""Requests follow from seed and index; lengths follow their distribution."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.workload import SHAREGPT_OUTPUT, SHAREGPT_PROMPT, Lengths, Workload


@pytest.mark.parametrize("text", ["fixed:128", "uniform:64-256", "lognormal:60,1.4,512"])
def test_lengths_are_written_as_they_are_read(text: str) -> None:
    assert str(Lengths.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "128",
        "fixed:0",
        "fixed:-1",
        "fixed:1.5",
        "fixed:99999999999",
        "uniform:9-8",
        "uniform:0-8",
        "lognormal:60,1.4",
        "lognormal:600,1.4,512",
        "lognormal:0,1.4,512",
        "lognormal:60,10.5,512",
        "poisson:5",
        "",
    ],
)
def test_other_lengths_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="allowed") as caught:
        Lengths.parse(text)
    assert repr(text) in str(caught.value)


def test_the_widest_log_normal_can_be_drawn() -> None:
    rng, lengths = random.Random(0), Lengths.parse("lognormal:1000000,10,1000000")
    assert all(1 <= lengths.draw(rng) <= 1_000_000 for _ in range(1000))


def test_sharegpt_is_a_name_for_lengths_of_prompts_and_of_outputs() -> None:
    parsed = Workload.parse("sharegpt", "sharegpt", seed=4)
    assert parsed == Workload(SHAREGPT_PROMPT, SHAREGPT_OUTPUT, seed=4)
    assert Workload.parse("fixed:3", "sharegpt").prompt == Lengths(3, 3)


@given(st.integers(1, 500), st.integers(0, 500), st.integers(0, 2**32))
def test_uniform_lengths_stay_within_both_bounds(low: int, more: int, seed: int) -> None:
    lengths = Lengths.parse(f"uniform:{low}-{low + more}")
    assert low <= lengths.draw(random.Random(seed)) <= low + more


def test_both_bounds_of_a_uniform_length_occur() -> None:
    rng = random.Random(0)
    assert {Lengths.parse("uniform:3-5").draw(rng) for _ in range(100)} == {3, 4, 5}


def test_a_log_normal_length_has_its_median_and_is_cut_without_a_heap_at_the_end() -> None:
    rng, lengths = random.Random(0), Lengths.parse("lognormal:100,0.8,1000000")
    logs = [math.log(lengths.draw(rng)) for _ in range(20_000)]
    assert statistics.fmean(logs) == pytest.approx(math.log(100), abs=0.02)
    assert statistics.stdev(logs) == pytest.approx(0.8, abs=0.02)
    cut = Lengths.parse("lognormal:100,0.8,120")
    drawn = [cut.draw(rng) for _ in range(20_000)]
    assert max(drawn) <= 120
    assert drawn.count(120) < 2 * drawn.count(115)


def test_sharegpt_lengths_have_the_published_means_before_they_are_cut() -> None:
    for lengths, mean in ((SHAREGPT_PROMPT, 161.31), (SHAREGPT_OUTPUT, 337.99)):
        assert lengths.sigma is not None
        assert lengths.median * math.exp(lengths.sigma**2 / 2) == pytest.approx(mean, rel=0.01)


WORKLOAD = Workload(
    Lengths.parse("uniform:4-9"), Lengths.parse("uniform:3-8"), shared_prefix=5, hang_up=0.5, seed=7
)


@given(st.integers(0, 10_000))
def test_a_request_depends_on_seed_and_index_alone(index: int) -> None:
    request = WORKLOAD.request(index, vocab_size=30)
    assert request == WORKLOAD.request(index, vocab_size=30)
    assert 5 + 4 <= len(request.token_ids) <= 5 + 9
    assert set(request.token_ids) <= set(range(30))
    assert 3 <= request.max_tokens <= 8
    assert request.token_ids[:5] == WORKLOAD.request(0, vocab_size=30).token_ids[:5]


def test_requests_and_seeds_differ() -> None:
    one = {tuple(WORKLOAD.request(index, 1000).token_ids[5:]) for index in range(100)}
    assert len(one) == 100
    other = Workload(WORKLOAD.prompt, WORKLOAD.output, seed=8)
    assert other.request(0, 1000).token_ids != WORKLOAD.request(0, 1000).token_ids[5:]


def test_the_sequence_of_requests_is_the_same_on_every_machine() -> None:
    request = WORKLOAD.request(3, vocab_size=1000)
    assert request.token_ids == [66, 124, 153, 923, 686, 440, 984, 763, 142, 936, 140, 675]
    assert (request.max_tokens, request.hang_up_after) == (7, None)


def test_the_wanted_share_of_clients_hangs_up_half_way() -> None:
    requests = [WORKLOAD.request(index, 30) for index in range(1000)]
    leaving = [request for request in requests if request.hang_up_after is not None]
    assert 430 < len(leaving) < 570
    assert all(request.hang_up_after == (request.max_tokens + 1) // 2 for request in leaving)


@pytest.mark.parametrize("wrong", [{"shared_prefix": -1}, {"hang_up": 1.5}, {"hang_up": math.nan}])
def test_a_wrong_workload_is_refused_by_field(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is .*allowed"):
        Workload(WORKLOAD.prompt, WORKLOAD.output, **wrong)  # type: ignore[arg-type]
