"""Every field of a request: boundary values pass, whatever lies just outside is refused by name."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.errors import InvalidRequestError, Violation
from service.engine.sampling_params import SamplingParams
from service.engine.validation import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MIN_TEMPERATURE,
    ModelLimits,
    prompt_violations,
    validate_generation,
)

LIMITS = ModelLimits(vocab_size=5000, max_model_len=100)
PROMPT = [1, 2, 3]
ROOM = 97
NAN, INF = math.nan, math.inf


def violations(
    params: SamplingParams, prompt: Sequence[int] = PROMPT, limits: ModelLimits = LIMITS
) -> tuple[Violation, ...]:
    try:
        validate_generation(prompt, params, limits)
    except InvalidRequestError as error:
        return error.violations
    return ()


ALLOWED: dict[str, tuple[object, ...]] = {
    "max_tokens": (None, 1, ROOM),
    "min_tokens": (0, ROOM),
    "temperature": (0.0, MIN_TEMPERATURE, 1, 100.0),
    "top_k": (0, 1, 5000),
    "top_p": (1e-6, 0.5, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 1.0, 100.0),
    "presence_penalty": (-2.0, 0.0, 2.0),
    "frequency_penalty": (-2.0, 0.0, 2.0),
    "seed": (None, 0, MAX_SEED),
    "stop": ((), ("a",), ("x" * MAX_STOP_CHARS,) * MAX_STOP_STRINGS),
    "stop_token_ids": ((), (0,), (4999,), (7,) * MAX_STOP_TOKEN_IDS),
    "ignore_eos": (False, True),
    "logprobs": (None, 0, MAX_LOGPROBS),
    "logit_bias": ({}, {0: -100.0, 4999: 100.0}, dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0)),
    "allowed_token_ids": ((), (0, 4999), tuple(range(5000))),
}

# field, value, field that the refusal names, parts of the text that say what is allowed
REFUSED: list[tuple[str, object, str, tuple[str, ...]]] = [
    ("max_tokens", 0, "max_tokens", ("1 to 97", "100", "3 prompt tokens")),
    ("max_tokens", -1, "max_tokens", ("1 to 97",)),
    ("max_tokens", ROOM + 1, "max_tokens", ("1 to 97",)),
    ("max_tokens", 2**32 - 1, "max_tokens", ("1 to 97",)),
    ("min_tokens", -1, "min_tokens", ("0 to 97",)),
    ("min_tokens", ROOM + 1, "min_tokens", ("0 to 97",)),
    *[
        ("temperature", value, "temperature", ("0 to 100",))
        for value in (-0.1, 100.1, NAN, INF, -INF)
    ],
    *[
        ("temperature", value, "temperature", ("0 (greedy)", "1e-05 to 100"))
        for value in (MIN_TEMPERATURE * 0.99, 1e-46, 5e-324)
    ],
    ("top_k", -1, "top_k", ("0 (off) to 5000",)),
    ("top_k", 5001, "top_k", ("0 (off) to 5000",)),
    *[("top_p", value, "top_p", ("above 0, at most 1",)) for value in (0.0, -0.1, 1.01, NAN, INF)],
    *[("min_p", value, "min_p", ("0 to 1",)) for value in (-0.1, 1.01, NAN, INF)],
    *[
        ("repetition_penalty", value, "repetition_penalty", ("0.01 to 100",))
        for value in (0.0, 0.0099, -1.0, 100.1, NAN, INF)
    ],
    *[
        (field, value, field, ("-2 to 2",))
        for field in ("presence_penalty", "frequency_penalty")
        for value in (-2.1, 2.1, NAN, INF)
    ],
    ("seed", -1, "seed", (f"0 to {MAX_SEED}",)),
    ("seed", MAX_SEED + 1, "seed", (f"0 to {MAX_SEED}",)),
    ("stop", ("",), "stop[0]", ("1 to 256 characters",)),
    ("stop", ("a", "x" * (MAX_STOP_CHARS + 1)), "stop[1]", ("1 to 256 characters",)),
    ("stop", ("a",) * (MAX_STOP_STRINGS + 1), "stop", ("at most 16",)),
    ("stop_token_ids", (-1,), "stop_token_ids[0]", ("0 to 4999",)),
    ("stop_token_ids", (1, 5000), "stop_token_ids[1]", ("0 to 4999",)),
    ("stop_token_ids", (7,) * (MAX_STOP_TOKEN_IDS + 1), "stop_token_ids", ("at most 64",)),
    ("logprobs", -1, "logprobs", ("0 to 20",)),
    ("logprobs", MAX_LOGPROBS + 1, "logprobs", ("0 to 20",)),
    ("logit_bias", {-1: 1.0}, "logit_bias[-1]", ("0 to 4999",)),
    ("logit_bias", {1: 1.0, 5000: 1.0}, "logit_bias[5000]", ("0 to 4999",)),
    *[
        ("logit_bias", {7: value}, "logit_bias[7]", ("-100 to 100",))
        for value in (-100.5, 100.5, NAN, INF, -INF)
    ],
    (
        "logit_bias",
        dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0),
        "logit_bias",
        ("at most 1024",),
    ),
    ("allowed_token_ids", (-1,), "allowed_token_ids[0]", ("0 to 4999",)),
    ("allowed_token_ids", (1, 5000), "allowed_token_ids[1]", ("0 to 4999",)),
    ("allowed_token_ids", (1, 2, 1), "allowed_token_ids[2]", ("each id once",)),
]


def with_field(field: str, value: object) -> SamplingParams:
    return replace(SamplingParams(), **{field: value})  # type: ignore[arg-type]


def test_the_tables_cover_every_field() -> None:
    fields = set(SamplingParams.__dataclass_fields__)
    assert set(ALLOWED) == fields
    assert {row[0] for row in REFUSED} == fields - {"ignore_eos"}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in ALLOWED.items() for value in values]
)
def test_values_up_to_the_boundary_are_allowed(field: str, value: object) -> None:
    assert violations(with_field(field, value)) == ()


@pytest.mark.parametrize(("field", "value", "named", "allowed"), REFUSED)
def test_values_outside_are_refused_by_name_and_range(
    field: str, value: object, named: str, allowed: tuple[str, ...]
) -> None:
    (violation,) = violations(with_field(field, value))
    assert violation.field == f"sampling.{named}"
    for part in allowed:
        assert part in violation.allowed


@pytest.mark.parametrize("value", [NAN, INF, -INF, -0.25])
def test_the_refused_number_is_quoted(value: float) -> None:
    (violation,) = violations(SamplingParams(temperature=value))
    assert violation.given == f"{value:g}"


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    params = SamplingParams(max_tokens=1)
    assert violations(params, [1]) == ()
    assert violations(params, [1] * 99) == ()
    (violation,) = violations(params, [1] * 100)
    assert violation.field == "prompt"
    assert "100 tokens" in violation.given
    assert "1 to 99" in violation.allowed


def test_an_empty_prompt_is_refused() -> None:
    (violation,) = violations(SamplingParams(), [])
    assert (violation.field, violation.given) == ("prompt", "empty")


@pytest.mark.parametrize(
    ("prompt", "index"), [([-1, 2], 0), ([1, 5000], 1), ([1, 2, -(2**40)], 2), ([2**63], 0)]
)
def test_a_prompt_token_outside_of_the_vocabulary_is_named_by_index(
    prompt: list[int], index: int
) -> None:
    (violation,) = violations(SamplingParams(), prompt)
    assert violation.field == f"prompt.token_ids[{index}]"
    assert violation.given == str(prompt[index])
    assert violation.allowed == "0 to 4999"


def test_the_edges_of_the_vocabulary_are_tokens() -> None:
    assert violations(SamplingParams(), [0, 4999]) == ()


def test_one_wrong_token_is_enough_to_find_the_mistake() -> None:
    assert len(violations(SamplingParams(), [9999] * 50)) == 1


def test_a_scored_prompt_may_fill_the_whole_context() -> None:
    assert not list(prompt_violations([1] * 100, LIMITS, max_len=100, field="input"))
    (violation,) = prompt_violations([1] * 101, LIMITS, max_len=100, field="input")
    assert violation.field == "input"


def test_min_tokens_may_reach_max_tokens_and_no_further() -> None:
    assert violations(SamplingParams(max_tokens=5, min_tokens=5)) == ()
    (violation,) = violations(SamplingParams(max_tokens=5, min_tokens=6))
    assert violation.field == "sampling.min_tokens"
    assert "0 to 5" in violation.allowed


def test_alternatives_cannot_be_more_than_the_vocabulary() -> None:
    small = ModelLimits(vocab_size=5, max_model_len=100)
    assert violations(SamplingParams(logprobs=5), limits=small) == ()
    (violation,) = violations(SamplingParams(logprobs=6), limits=small)
    assert violation.field == "sampling.logprobs"


ENDING = ModelLimits(vocab_size=5000, max_model_len=100, eos_token_ids=frozenset({8, 9}))


@pytest.mark.parametrize(
    "stuck",
    [
        SamplingParams(min_tokens=1, allowed_token_ids=(1, 2), stop_token_ids=(1, 2, 3)),
        SamplingParams(min_tokens=1, allowed_token_ids=(8,)),
        SamplingParams(min_tokens=1, allowed_token_ids=(9, 1, 8), stop_token_ids=(1,)),
    ],
)
def test_something_must_remain_to_be_chosen_while_endings_are_held_back(
    stuck: SamplingParams,
) -> None:
    (violation,) = violations(stuck, limits=ENDING)
    assert violation.field == "sampling.min_tokens"
    assert "allowed_token_ids" in violation.allowed
    assert violations(replace(stuck, min_tokens=0), limits=ENDING) == ()
    more = replace(stuck, allowed_token_ids=(*stuck.allowed_token_ids, 4))
    assert violations(more, limits=ENDING) == ()


def test_an_ignored_end_of_sequence_may_be_all_that_is_allowed() -> None:
    params = SamplingParams(min_tokens=1, allowed_token_ids=(8, 9), ignore_eos=True)
    assert violations(params, limits=ENDING) == ()


def test_a_vocabulary_of_endings_leaves_nothing_to_be_chosen() -> None:
    limits = ModelLimits(vocab_size=3, max_model_len=100, eos_token_ids=frozenset({2}))
    params = SamplingParams(min_tokens=1, stop_token_ids=(0, 1))
    (violation,) = violations(params, [1], limits)
    assert violation.field == "sampling.min_tokens"
    assert violations(replace(params, stop_token_ids=(0,)), [1], limits) == ()


def test_all_violations_are_reported_at_once() -> None:
    params = SamplingParams(
        max_tokens=0,
        min_tokens=-1,
        temperature=NAN,
        top_k=-1,
        top_p=0.0,
        min_p=2.0,
        repetition_penalty=INF,
        presence_penalty=3.0,
        frequency_penalty=-3.0,
        seed=-1,
        stop=("", "x" * 1000),
        stop_token_ids=(-5,),
        logprobs=99,
        logit_bias={-1: NAN},
        allowed_token_ids=(9999,),
    )
    with pytest.raises(InvalidRequestError) as raised:
        validate_generation([-1], params, LIMITS)
    fields = [violation.field for violation in raised.value.violations]
    assert sorted(fields) == sorted(
        [
            "prompt.token_ids[0]",
            "sampling.allowed_token_ids[0]",
            "sampling.frequency_penalty",
            "sampling.logit_bias[-1]",
            "sampling.logprobs",
            "sampling.max_tokens",
            "sampling.min_p",
            "sampling.min_tokens",
            "sampling.presence_penalty",
            "sampling.repetition_penalty",
            "sampling.seed",
            "sampling.stop[0]",
            "sampling.stop[1]",
            "sampling.stop_token_ids[0]",
            "sampling.temperature",
            "sampling.top_k",
            "sampling.top_p",
        ]
    )
    for field in fields[:6]:
        assert field in str(raised.value)
    assert str(raised.value).endswith(f"; and {len(fields) - 6} more"), "it has to fit a header"


def test_ten_thousand_bad_stop_strings_do_not_make_ten_thousand_violations() -> None:
    found = violations(SamplingParams(stop=("",) * 10_000))
    assert found[0] == Violation("sampling.stop", "10000 strings", "at most 16")
    assert len(found) == 1 + MAX_STOP_STRINGS


@given(
    field=st.sampled_from(
        ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"]
    ),
    value=st.floats(),
)
def test_no_number_passes_that_is_not_finite(field: str, value: float) -> None:
    found = violations(with_field(field, value))
    assert len(found) <= 1
    if not math.isfinite(value):
        assert [violation.field for violation in found] == [f"sampling.{field}"]


@given(
    prompt=st.lists(st.integers(), max_size=110),
    max_tokens=st.none() | st.integers(),
    min_tokens=st.integers(),
    top_k=st.integers(),
    seed=st.none() | st.integers(),
    stop_token_ids=st.lists(st.integers(), max_size=70).map(tuple),
    logit_bias=st.dictionaries(st.integers(), st.floats(), max_size=5),
)
def test_the_validator_is_total(
    prompt: list[int],
    max_tokens: int | None,
    min_tokens: int,
    top_k: int,
    seed: int | None,
    stop_token_ids: tuple[int, ...],
    logit_bias: dict[int, float],
) -> None:
    """Whatever the integers are, the answer is a list of violations with a text, or none."""
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        top_k=top_k,
        seed=seed,
        stop_token_ids=stop_token_ids,
        logit_bias=logit_bias,
    )
    for violation in violations(params, prompt):
        assert violation.field
        assert violation.given
        assert violation.allowed
