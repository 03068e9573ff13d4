"""The whole synchronous engine on a real tiny model: what runs beside a request cannot be seen."""

import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import TokenizerError
from models.kernels import KernelName
from models.transformer import Transformer
from service.engine import SamplingParams
from service.engine.config import EngineConfig
from service.engine.engine import Engine, EngineRequest, RequestOutput
from service.engine.errors import InvalidRequestError, NeverFitsError
from service.engine.sequence import FinishReason
from service.engine.stats import StepStats
from tests import checkpoints
from tests.engine.tiny import (
    CONFIG,
    EOS,
    MAX_LEN,
    finish_all,
    greedy,
    log_softmax,
    reason,
    tiny_engine,
    tiny_model,
)
from tests.fakes import FakeClock
from tests.models.kernels import KERNELS

BROKEN = 200


def random_prompts(count: int, *, max_length: int = 40, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(BROKEN) for _ in range(rng.randint(1, max_length))] for _ in range(count)
    ]


PROMPTS = random_prompts(33)
GREEDY = [greedy(16)] * 33
SEEDED = [SamplingParams(max_tokens=16, seed=seed, ignore_eos=True) for seed in range(33)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model()


@pytest.fixture(scope="module", params=[GREEDY, SEEDED], ids=["greedy", "seeded"])
def params(request: pytest.FixtureRequest) -> list[SamplingParams]:
    return list(request.param)


@pytest.fixture(scope="module")
def alone(model: Transformer, params: list[SamplingParams]) -> list[RequestOutput]:
    """Every request in an engine of its own."""
    outputs = [
        tiny_engine(model).generate([prompt], each)[0]
        for prompt, each in zip(PROMPTS, params, strict=True)
    ]
    assert len({token for output in outputs for token in output.token_ids}) > 50
    return outputs


# The same request gives the same tokens, whatever runs beside it and however it is computed.


def test_batch_mates_change_nothing(
    model: Transformer, params: list[SamplingParams], alone: list[RequestOutput]
) -> None:
    largest = 0

    def observe(stats: StepStats) -> None:
        nonlocal largest
        largest = max(largest, stats.num_sequences)

    assert tiny_engine(model, on_step=observe).generate(PROMPTS, params) == alone
    assert largest == 33


@pytest.mark.parametrize("budget", [4, 7, 16, 61, 512])
def test_chunk_sizes_change_nothing(
    model: Transformer, params: list[SamplingParams], alone: list[RequestOutput], budget: int
) -> None:
    engine = tiny_engine(model, max_num_batched_tokens=budget, max_num_seqs=4)
    assert engine.generate(PROMPTS[:12], params[:12]) == alone[:12]


@pytest.mark.parametrize("caching", [False, True])
def test_preemption_changes_nothing(
    model: Transformer, params: list[SamplingParams], alone: list[RequestOutput], caching: bool
) -> None:
    num_preempted = 0

    def observe(stats: StepStats) -> None:
        nonlocal num_preempted
        num_preempted += stats.num_preempted

    engine = tiny_engine(model, on_step=observe, num_blocks=24, enable_prefix_caching=caching)
    assert engine.generate(PROMPTS, params) == alone
    assert num_preempted > 10


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_change_nothing(
    params: list[SamplingParams], alone: list[RequestOutput], kernel: KernelName
) -> None:
    engine = tiny_engine(tiny_model(kernel=kernel))
    assert engine.generate(PROMPTS[:8], params[:8]) == alone[:8]


def test_a_cached_prefix_changes_nothing(
    model: Transformer, params: list[SamplingParams], alone: list[RequestOutput]
) -> None:
    engine = tiny_engine(model, num_blocks=512, enable_prefix_caching=True)
    requests = [EngineRequest(prompt, each) for prompt, each in zip(PROMPTS, params, strict=True)]
    for first in (True, False):
        for request, output, expected in zip(
            requests, finish_all(engine, requests), alone, strict=True
        ):
            assert list(output.token_ids) == expected.token_ids
            assert output.finish is not None
            cached = (len(request.prompt_token_ids) - 1) // 4 * 4
            assert output.finish.usage.cached_tokens == (0 if first else cached)


def test_without_prefix_caching_nothing_is_reused(model: Transformer) -> None:
    engine = tiny_engine(model)
    for _ in range(2):
        (output,) = finish_all(engine, [EngineRequest([1] * 20, greedy(2))])
        assert output.finish is not None
        assert output.finish.usage.cached_tokens == 0


def test_a_prefix_is_not_reused_across_namespaces(model: Transformer) -> None:
    engine = tiny_engine(model, enable_prefix_caching=True)
    cached = []
    for namespace in (b"one", b"two", b"one"):
        request = EngineRequest([1] * 20, greedy(2), cache_namespace=namespace)
        (output,) = finish_all(engine, [request])
        assert output.finish is not None
        cached.append(output.finish.usage.cached_tokens)
    assert cached == [0, 0, 16]


def test_without_a_seed_sampling_differs(model: Transformer) -> None:
    outputs = tiny_engine(model).generate([[1, 2, 3]] * 2, SamplingParams(max_tokens=16))
    assert outputs[0].token_ids != outputs[1].token_ids


def test_greedy_is_the_most_likely_token_of_the_model(model: Transformer) -> None:
    (output,) = tiny_engine(model).generate([PROMPTS[0]], greedy(8))
    sequence = [*PROMPTS[0], *output.token_ids]
    best = log_softmax(model, sequence[:-1]).argmax(dim=-1)
    assert output.token_ids == best[len(PROMPTS[0]) - 1 :].tolist()


# Log-probabilities


@pytest.mark.parametrize("budget", [4, 512])
def test_logprobs_are_those_of_the_model(model: Transformer, budget: int) -> None:
    engine = tiny_engine(model, max_num_batched_tokens=budget, max_num_seqs=4)
    params = [SamplingParams(max_tokens=6, seed=3, temperature=2.0, logprobs=n) for n in (0, 5)]
    for prompt in PROMPTS[:4]:
        for each, output in zip(params, engine.generate([prompt] * 2, params), strict=True):
            expected = log_softmax(model, [*prompt, *output.token_ids])
            assert len(output.logprobs) == len(output.token_ids)
            for index, (token_id, logprobs) in enumerate(
                zip(output.token_ids, output.logprobs, strict=True)
            ):
                row = expected[len(prompt) - 1 + index]
                assert abs(logprobs.logprob - float(row[token_id])) <= 1e-5
                best = row.topk(each.logprobs or 0)
                assert [token for token, _ in logprobs.top] == best.indices.tolist()
                for (_, value), expected_value in zip(logprobs.top, best.values, strict=True):
                    assert abs(value - float(expected_value)) <= 1e-5


def test_logprobs_are_reported_only_when_asked_for(model: Transformer) -> None:
    (output,) = tiny_engine(model).generate([[1, 2]], greedy(4))
    assert output.logprobs == []


@pytest.mark.parametrize("budget", [3, 16, 512])
@pytest.mark.parametrize("num_tokens", [1, 2, 33, MAX_LEN])
def test_scores_are_those_of_the_model(model: Transformer, budget: int, num_tokens: int) -> None:
    rng = random.Random(num_tokens)
    prompt = [rng.randrange(259) for _ in range(num_tokens)]
    engine = tiny_engine(model, max_num_batched_tokens=budget, max_num_seqs=3)
    scored, generated = finish_all(
        engine, [EngineRequest(prompt, None), EngineRequest([5, 6], greedy(4))]
    )
    expected = log_softmax(model, prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert len(scored.prompt_logprobs) == num_tokens - 1
    difference = (torch.tensor(scored.prompt_logprobs) - expected).abs()
    assert difference.numel() == 0 or difference.max() <= 1e-5
    assert scored.token_ids == ()
    assert reason(scored) is FinishReason.LENGTH
    assert (
        list(generated.token_ids) == tiny_engine(model).generate([[5, 6]], greedy(4))[0].token_ids
    )


# Endings


def test_end_of_sequence_ends_once_min_tokens_are_there(model: Transformer) -> None:
    params = [
        greedy(6, logit_bias={EOS: 100.0}, ignore_eos=False),
        greedy(6, logit_bias={EOS: 100.0}, ignore_eos=False, min_tokens=3),
        greedy(6, logit_bias={EOS: 100.0}),
        greedy(6, logit_bias={7: 100.0}, stop_token_ids=(7,), min_tokens=3),
    ]
    first, later, ignored, stopped = tiny_engine(model).generate([[1, 2]] * 4, params)
    assert (first.token_ids, first.finish_reason) == ([EOS], FinishReason.EOS)
    assert (len(later.token_ids), later.finish_reason) == (4, FinishReason.EOS)
    assert EOS not in later.token_ids[:3]
    assert (ignored.token_ids, ignored.finish_reason) == ([EOS] * 6, FinishReason.LENGTH)
    assert (len(stopped.token_ids), stopped.finish_reason) == (4, FinishReason.STOP)
    assert stopped.token_ids.index(7) == 3


def lettered(model: Transformer, **changes: Any) -> tuple[Engine, SamplingParams]:
    """An engine with a tokenizer of bytes, and settings that produce letters only."""
    tokenizer = checkpoints.headroom_byte_tokenizer()
    engine = Engine(model, EngineConfig(num_blocks=64, block_size=4), tokenizer=tokenizer)
    letters = tuple(tokenizer.encode("abcdefghijklmnopqrstuvwxyz"))
    params = SamplingParams(max_tokens=40, seed=5, allowed_token_ids=letters)
    return engine, dataclasses.replace(params, **changes)


def text_of(token_ids: Sequence[int]) -> str:
    return checkpoints.headroom_byte_tokenizer().decode(list(token_ids))


@pytest.mark.parametrize(("start", "length"), [(0, 1), (5, 2), (11, 3), (35, 5)])
def test_a_stop_string_ends_with_the_token_that_completes_it(
    model: Transformer, start: int, length: int
) -> None:
    engine, params = lettered(model)
    text = text_of(engine.generate([[1, 2]], params)[0].token_ids)
    assert len(text) == 40
    stop = text[start : start + length]
    end = text.find(stop) + length
    engine, params = lettered(model, stop=("#", stop))
    (output,) = finish_all(engine, [EngineRequest([1, 2], params)])
    assert text_of(output.token_ids) == text[:end]
    assert output.finish is not None
    assert (output.finish.reason, output.finish.matched_stop) == (FinishReason.STOP, stop)


def test_a_stop_string_is_not_looked_for_before_min_tokens(model: Transformer) -> None:
    engine, params = lettered(model)
    text = text_of(engine.generate([[1, 2]], params)[0].token_ids)
    engine, params = lettered(model, stop=tuple("abcdefghijklm"), min_tokens=20)
    (output,) = engine.generate([[1, 2]], params)
    first = next(index for index in range(20, 40) if text[index] in "abcdefghijklm")
    assert any(letter in "abcdefghijklm" for letter in text[:20])
    assert text_of(output.token_ids) == text[: first + 1]


def test_stop_strings_of_two_requests_do_not_mix(model: Transformer) -> None:
    engine, params = lettered(model)
    text = text_of(engine.generate([[1, 2]], params)[0].token_ids)
    both = [lettered(model, stop=(text[3:5],))[1], lettered(model, stop=(text[9:11],))[1]]
    outputs = engine.generate([[1, 2]] * 2, both)
    assert [text_of(output.token_ids) for output in outputs] == [
        text[: text.find(text[3:5]) + 2],
        text[: text.find(text[9:11]) + 2],
    ]


def test_stop_strings_need_a_tokenizer(model: Transformer) -> None:
    engine = tiny_engine(model)
    with pytest.raises(InvalidRequestError, match=r"sampling\.stop"):
        engine.add(EngineRequest([1], greedy(stop=("a",))))
    assert not engine.has_unfinished


def test_without_max_tokens_a_generation_fills_the_context(model: Transformer) -> None:
    (output,) = tiny_engine(model, max_model_len=30).generate([[1] * 10], greedy(None))
    assert output.finish_reason is FinishReason.CONTEXT_FULL
    assert len(output.token_ids) == 20


def test_a_timeout_ends_a_request_with_what_it_has(model: Transformer) -> None:
    clock = FakeClock(100.0)
    engine = Engine(model, EngineConfig(num_blocks=64), clock=clock)
    late = engine.add(EngineRequest([1, 2], greedy(50), timeout=5.0))
    other = engine.add(EngineRequest([1, 2], greedy(2)))
    engine.step()
    clock.advance(4.9)
    assert [output.finish is None for output in engine.step()] == [True, False]
    clock.advance(0.1)
    (output,) = engine.step()
    assert (output.seq_id, reason(output)) == (late, FinishReason.DEADLINE)
    assert output.finish is not None
    assert output.finish.usage.completion_tokens == 2
    assert output.finish.timings.total == pytest.approx(5.0)
    assert other > late, "ids grow with arrival"
    assert not engine.has_unfinished


def test_an_abort_ends_a_request_once(model: Transformer) -> None:
    engine = tiny_engine(model)
    seq_id = engine.add(EngineRequest([1, 2], greedy(50)))
    engine.step()
    output = engine.abort(seq_id)
    assert output is not None
    assert reason(output) is FinishReason.CANCELLED
    assert engine.abort(seq_id) is None
    assert engine.load.kv_blocks_used == 0


# Weights that are not numbers harm only who reads them.

# Nobody reads the broken embedding because of a token of its own output.
SOUND = greedy(logit_bias={BROKEN: -100.0})


@pytest.fixture(scope="module", params=KERNELS)
def broken_model(request: pytest.FixtureRequest) -> Transformer:
    return tiny_model(kernel=request.param, broken_token=BROKEN)


def test_a_request_whose_logits_are_not_numbers_ends_with_an_error(
    broken_model: Transformer,
) -> None:
    params = [greedy(), SamplingParams(seed=1, max_tokens=4, logprobs=2, repetition_penalty=1.2)]
    for output in tiny_engine(broken_model).generate([[1, BROKEN, 3]] * 2, params):
        assert (output.token_ids, output.finish_reason) == ([], FinishReason.ERROR)


def test_its_batch_mates_are_not_changed(model: Transformer, broken_model: Transformer) -> None:
    mates = [[1, 2, 3], [4, 5], [6] * 30]
    expected = tiny_engine(model).generate(mates, SOUND)
    broken, *outputs = tiny_engine(broken_model).generate([[BROKEN, 7], *mates], SOUND)
    assert broken.finish_reason is FinishReason.ERROR
    assert outputs == expected


def test_whoever_gets_its_blocks_is_not_changed(
    model: Transformer, broken_model: Transformer
) -> None:
    expected = tiny_engine(model).generate([[1, 2, 3]], SOUND)
    engine = tiny_engine(broken_model, num_blocks=4)
    assert engine.generate([[BROKEN] * 15], greedy(1))[0].finish_reason is FinishReason.ERROR
    assert engine.generate([[1, 2, 3]], SOUND) == expected


def test_decoding_mates_are_not_changed_by_what_is_written_beside_them(
    model: Transformer, broken_model: Transformer
) -> None:
    """Long and short mates decode while a broken prompt takes the first block of the pool."""
    mates = [[6] * 30, [4, 5]]
    expected = tiny_engine(model).generate(mates, SOUND)
    engine = tiny_engine(broken_model)
    engine.add(EngineRequest([1], greedy(1)))
    ids = [engine.add(EngineRequest(mate, SOUND)) for mate in mates]
    tokens: dict[int, list[int]] = {seq_id: [] for seq_id in ids}
    while engine.has_unfinished:
        for output in engine.step():
            tokens.setdefault(output.seq_id, []).extend(output.token_ids)
        if all(len(tokens[seq_id]) == 1 for seq_id in ids):
            broken = engine.add(EngineRequest([BROKEN, 7, 8], greedy()))
    assert tokens[broken] == []
    assert [tokens[seq_id] for seq_id in ids] == [output.token_ids for output in expected]


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("num_blocks", [24, 256])
def test_only_those_who_read_the_broken_embedding_fail(
    model: Transformer,
    broken_model: Transformer,
    params: list[SamplingParams],
    caching: bool,
    num_blocks: int,
) -> None:
    """In a crowd with chunks and preemption, twice, so that blocks change their owners."""
    params = [dataclasses.replace(each, logit_bias=SOUND.logit_bias) for each in params]
    expected = tiny_engine(model).generate(PROMPTS, params)
    rng = random.Random(0)
    prompts = [list(prompt) for prompt in PROMPTS]
    broken = set(range(0, 33, 3))
    for index in broken:
        prompts[index].insert(rng.randint(0, len(prompts[index])), BROKEN)
    engine = tiny_engine(
        broken_model,
        num_blocks=num_blocks,
        enable_prefix_caching=caching,
        max_num_batched_tokens=16,
        max_num_seqs=8,
    )
    for _ in range(2):
        for index, output in enumerate(engine.generate(prompts, params)):
            if index in broken:
                assert (output.token_ids, output.finish_reason) == ([], FinishReason.ERROR)
            else:
                assert output == expected[index]


def test_scores_that_are_not_numbers_are_an_error(broken_model: Transformer) -> None:
    (output,) = finish_all(tiny_engine(broken_model), [EngineRequest([1, BROKEN, 3], None)])
    assert reason(output) is FinishReason.ERROR


@pytest.mark.parametrize("params", [greedy(), SamplingParams(seed=1), None])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_head_that_is_no_number_is_an_error_too(
    params: SamplingParams | None, value: float
) -> None:
    """Hidden states are finite here, the logits made of them are not."""
    model = tiny_model()
    assert model.lm_head is not None
    with torch.no_grad():
        model.lm_head.weight[9] = value
    (output,) = finish_all(tiny_engine(model), [EngineRequest([1, 2, 3], params)])
    assert reason(output) is FinishReason.ERROR
    assert output.token_ids == ()


# A request that passes validation cannot harm the engine.


def run_if_valid(model: Transformer, params: SamplingParams) -> RequestOutput | None:
    """The output, or None if validation refuses the settings. A raise in a step is a failure."""
    try:
        return tiny_engine(model).generate([[1, 2, 3]], params)[0]
    except InvalidRequestError:
        return None


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=3, seed=1, temperature=1e-46),
        SamplingParams(max_tokens=3, seed=1, temperature=5e-324),
        SamplingParams(max_tokens=3, seed=1, repetition_penalty=1e-45),
        SamplingParams(max_tokens=3, seed=1, repetition_penalty=5e-324),
        SamplingParams(max_tokens=3, seed=1, top_p=5e-324),
        SamplingParams(max_tokens=3, seed=1, min_p=5e-324),
    ],
    ids=lambda params: repr(min(params.temperature, params.repetition_penalty, params.top_p)),
)
def test_tiny_numbers_do_not_break_a_step(model: Transformer, params: SamplingParams) -> None:
    output = run_if_valid(model, params)
    assert output is None or len(output.token_ids) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_while_endings_are_held_back_other_allowed_tokens_are_chosen(
    model: Transformer, temperature: float
) -> None:
    nothing_left = SamplingParams(
        max_tokens=4,
        min_tokens=2,
        seed=1,
        temperature=temperature,
        allowed_token_ids=(EOS, 7),
        stop_token_ids=(7,),
    )
    assert run_if_valid(model, nothing_left) is None
    one_left = dataclasses.replace(nothing_left, allowed_token_ids=(EOS, 7, 5))
    output = run_if_valid(model, one_left)
    assert output is not None
    assert output.token_ids[:2] == [5, 5]
    assert {*output.token_ids} <= {EOS, 7, 5}


@settings(max_examples=60, report_multiple_bugs=False)
@given(
    params=st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 3),
        min_tokens=st.integers(0, 3),
        temperature=st.floats(0, 100),
        top_k=st.integers(0, 259),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0, 100, exclude_min=True),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        seed=st.integers(0, 2**64 - 1),
        stop_token_ids=st.lists(st.integers(0, 258), max_size=3).map(tuple),
        ignore_eos=st.booleans(),
        logprobs=st.none() | st.integers(0, 20),
        logit_bias=st.dictionaries(st.integers(0, 258), st.floats(-100, 100), max_size=3),
        allowed_token_ids=st.lists(st.integers(0, 258), max_size=3, unique=True).map(tuple),
    )
)
def test_whatever_validation_accepts_runs(model: Transformer, params: SamplingParams) -> None:
    output = run_if_valid(model, params)
    if output is None:
        return
    assert output.finish_reason is not FinishReason.ERROR
    assert len(output.token_ids) >= max(params.min_tokens, 1)
    assert all(0 <= token_id < 259 for token_id in output.token_ids)
    if params.allowed_token_ids:
        assert {*output.token_ids} <= {*params.allowed_token_ids}


# generate()


@pytest.mark.parametrize("limit", [{"max_waiting_requests": 2}, {"max_waiting_tokens": 45}])
def test_more_prompts_than_the_queue_holds_are_fed_as_it_empties(
    model: Transformer, limit: dict[str, int]
) -> None:
    expected = tiny_engine(model).generate(PROMPTS, GREEDY)
    waiting: list[int] = []
    engine = tiny_engine(
        model,
        on_step=lambda stats: waiting.append(stats.load.num_waiting),
        max_num_seqs=2,
        **limit,
    )
    assert engine.generate(PROMPTS, GREEDY) == expected
    # One token each at least.
    assert 0 < max(waiting) <= max(limit.values())


def test_no_prompts_give_no_outputs(model: Transformer) -> None:
    assert tiny_engine(model).generate([], greedy()) == []


def test_settings_are_one_for_all_or_one_for_each(model: Transformer) -> None:
    engine = tiny_engine(model)
    outputs = engine.generate([[1], [2]], [greedy(1), greedy(2)])
    assert [len(output.token_ids) for output in outputs] == [1, 2]
    with pytest.raises(ValueError, match="zip"):
        engine.generate([[1], [2]], [greedy(1)])


class NeverEndsError(Exception):
    """Ends a generate() that would never return."""


def guarded_engine(model: Transformer, **config: int) -> Engine:
    remaining = iter(range(200))

    def observe(stats: StepStats) -> None:
        if next(remaining, None) is None:
            raise NeverEndsError

    return tiny_engine(model, on_step=observe, **config)


@pytest.mark.parametrize(
    ("prompts", "params", "error"),
    [
        ([[1, 2], [1, 999]], [greedy(2), greedy(2)], InvalidRequestError),
        ([[1, 2], []], [greedy(2), greedy(2)], InvalidRequestError),
        ([[1, 2], [1, 2]], [greedy(2), greedy(2, top_p=math.nan)], InvalidRequestError),
        ([[1, 2], [1, 2]], [greedy(2), greedy(2, stop=("a",))], InvalidRequestError),
        ([[1, 2], [1] * 30], [greedy(2), greedy(100)], NeverFitsError),
    ],
)
def test_a_batch_with_one_wrong_request_runs_nothing_and_leaves_nothing(
    model: Transformer,
    prompts: list[list[int]],
    params: list[SamplingParams],
    error: type[Exception],
) -> None:
    engine = guarded_engine(model, num_blocks=16)
    with pytest.raises(error):
        engine.generate(prompts, params)
    assert not engine.has_unfinished
    assert len(engine.generate([[1, 2]], greedy(2))[0].token_ids) == 2


def test_a_prompt_larger_than_the_queue_is_served_when_nothing_waits(model: Transformer) -> None:
    engine = guarded_engine(model, max_waiting_tokens=10)
    outputs = engine.generate([[1] * 11, [1] * 12], greedy(2))
    assert [len(output.token_ids) for output in outputs] == [2, 2]


def test_generate_needs_the_engine_for_itself(model: Transformer) -> None:
    engine = guarded_engine(model)
    engine.add(EngineRequest([1], greedy(2)))
    with pytest.raises(RuntimeError, match="without other requests"):
        engine.generate([[1]], greedy(2))


# Facts and listeners


def test_step_stats_add_up(model: Transformer) -> None:
    steps: list[StepStats] = []
    engine = tiny_engine(model, on_step=steps.append, max_num_batched_tokens=64)
    outputs = engine.generate(PROMPTS, GREEDY)
    # The last token of a generation is not computed.
    assert sum(stats.num_tokens for stats in steps) == sum(
        len(prompt) + len(output.token_ids) - 1
        for prompt, output in zip(PROMPTS, outputs, strict=True)
    )
    assert all(0 < stats.num_sequences <= stats.num_tokens <= 64 for stats in steps)
    assert all(stats.seconds > 0 for stats in steps)
    assert max(stats.load.num_running for stats in steps) > 20
    for stats in steps:
        assert stats.load.kv_blocks_total == 256
        assert stats.load.num_running <= stats.load.kv_blocks_used
    last = steps[-1].load
    assert (last.num_running, last.num_waiting, last.kv_blocks_used) == (0, 0, 0)
    assert engine.load == last


def test_preempted_tokens_are_counted_again(model: Transformer) -> None:
    steps: list[StepStats] = []
    tiny_engine(model, on_step=steps.append, num_blocks=16).generate(PROMPTS, GREEDY)
    minimum = sum(len(prompt) + 15 for prompt in PROMPTS)
    assert sum(stats.num_preempted for stats in steps) > 0
    assert sum(stats.num_tokens for stats in steps) > minimum


def test_cached_tokens_are_not_counted_as_computed(model: Transformer) -> None:
    steps: list[StepStats] = []
    engine = tiny_engine(model, on_step=steps.append, enable_prefix_caching=True)
    for expected in (20 + 1, 4 + 1):
        steps.clear()
        engine.generate([[1] * 20], greedy(2))
        assert sum(stats.num_tokens for stats in steps) == expected
    assert engine.load.kv_blocks_cached == 5


def test_an_idle_step_does_nothing(model: Transformer) -> None:
    steps: list[StepStats] = []
    engine = tiny_engine(model, on_step=steps.append)
    assert engine.step() == []
    assert (steps[0].num_tokens, steps[0].num_sequences) == (0, 0)


def test_the_context_is_that_of_the_model_or_shorter(model: Transformer) -> None:
    assert tiny_engine(model).max_model_len == MAX_LEN
    assert tiny_engine(model, max_model_len=MAX_LEN).limits.max_model_len == MAX_LEN
    assert tiny_engine(model, max_model_len=10).max_model_len == 10
    with pytest.raises(ValueError, match=f"max_model_len is {MAX_LEN + 1}; .* {MAX_LEN}"):
        tiny_engine(model, max_model_len=MAX_LEN + 1)


def test_a_shorter_context_refuses_longer_requests(model: Transformer) -> None:
    engine = tiny_engine(model, max_model_len=10)
    assert len(engine.generate([[1] * 9], greedy(1))[0].token_ids) == 1
    for prompt, params in (([1] * 10, greedy(None)), ([1] * 5, greedy(6)), ([1] * 11, None)):
        with pytest.raises(InvalidRequestError):
            engine.add(EngineRequest(prompt, params))
    assert len(finish_all(engine, [EngineRequest([1] * 10, None)])[0].prompt_logprobs) == 9


def test_the_cache_is_as_large_as_the_model_says(model: Transformer) -> None:
    engine = tiny_engine(model, num_blocks=7, block_size=16)
    assert engine.kv_bytes_per_token == CONFIG.kv_bytes_per_token()
    assert engine.kv_cache.nbytes == 7 * 16 * CONFIG.kv_bytes_per_token()
    assert engine.load.kv_blocks_total == 7


# From a checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.llama(), tmp_path_factory.mktemp("llama"))


def test_a_checkpoint_becomes_an_engine_with_its_tokenizer(checkpoint: Path) -> None:
    steps: list[StepStats] = []
    engine = Engine.from_checkpoint(checkpoint, on_step=steps.append)
    assert engine.max_model_len == 128
    stop = "a stop longer than the output"
    (output,) = engine.generate([[1, 2, 3]], greedy(5, stop=(stop,)))
    assert len(output.token_ids) == 5
    assert len(steps) == 5


def test_type_and_kernel_of_an_engine_are_configured(checkpoint: Path) -> None:
    config = EngineConfig(dtype="bfloat16", kernel="reference", num_blocks=8)
    engine = Engine.from_checkpoint(checkpoint, config)
    assert engine.model_runner.model.dtype is torch.bfloat16
    assert engine.kv_cache.pool.dtype is torch.bfloat16
    assert engine.model_runner.model.kernel_name == "reference"


def test_without_a_tokenizer_an_engine_serves_token_ids(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    engine = Engine.from_checkpoint(tmp_path, EngineConfig(num_blocks=8))
    assert len(engine.generate([[1, 2, 3]], greedy(2))[0].token_ids) == 2
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        engine.add(EngineRequest([1], greedy(stop=("a",))))


def test_a_tokenizer_that_is_none_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError):
        Engine.from_checkpoint(tmp_path, EngineConfig(num_blocks=8))
