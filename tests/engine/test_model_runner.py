"""From a plan to results: one per scheduled sequence, in order, with each sequence's own settings.

The oracle is the model without cache, and the sampler on its logits.
"""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.cpu.library import why_unavailable
from models.kv_cache import KVCache
from models.sampler import SamplingRow, sample
from models.transformer import Transformer, random_model
from service.engine.block_manager import BlockManager
from service.engine.model_runner import ModelRunner
from service.engine.plan import ScheduledSequence, StepPlan, StepResult
from service.engine.sampling_params import SamplingParams
from service.engine.sequence import Sequence
from tests.engine.tiny import CONFIG, EOS, log_softmax, tiny_model

BLOCK_SIZE = 4
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model()


@pytest.fixture
def runner(model: Transformer) -> ModelRunner:
    cache = KVCache(
        CONFIG, num_pages=256, block_size=BLOCK_SIZE, dtype=model.dtype, device=model.device
    )
    return ModelRunner(model, cache, eos_token_ids=frozenset(CONFIG.eos_token_ids))


@pytest.fixture
def blocks() -> BlockManager:
    return BlockManager(256, BLOCK_SIZE, enable_prefix_caching=False)


def admit(blocks: BlockManager, token_ids: list[int], params: SamplingParams | None) -> Sequence:
    seq = Sequence(seq_id=0, token_ids=list(token_ids), params=params, arrival_time=0.0)
    assert blocks.admit(seq, first_step=1000, max_new_tokens=1000, reserve=[0])
    return seq


def plan(*items: tuple[Sequence, int]) -> StepPlan:
    return StepPlan.of(ScheduledSequence.next_of(seq, count) for seq, count in items)


def run(runner: ModelRunner, *items: tuple[Sequence, int]) -> list[StepResult]:
    """Results of one step, those too that are only a token."""
    return [
        StepResult(result) if isinstance(result, int) else result
        for result in runner.run(plan(*items))
    ]


def random_tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(CONFIG.vocab_size) for _ in range(count)]


def best_token(model: Transformer, token_ids: list[int]) -> int:
    return int(log_softmax(model, token_ids)[-1].argmax())


def test_an_empty_plan_gives_no_results(runner: ModelRunner) -> None:
    assert run(runner) == []


def test_results_are_in_the_order_of_the_plan(
    model: Transformer, runner: ModelRunner, blocks: BlockManager
) -> None:
    one, several, scored, unfinished = (
        admit(blocks, [7], GREEDY),
        admit(blocks, random_tokens(9, 1), GREEDY),
        admit(blocks, random_tokens(6, 2), None),
        admit(blocks, random_tokens(11, 3), GREEDY),
    )
    results = run(runner, (one, 1), (unfinished, 5), (scored, 6), (several, 9))
    assert [result.token_id for result in results] == [
        best_token(model, [7]),
        None,
        None,
        best_token(model, several.token_ids),
    ]
    assert [len(result.prompt_logprobs) for result in results] == [0, 0, 5, 0]
    assert all(result.logprobs is None for result in results)


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 5], [5, 4], [3, 1, 3, 2], [8, 1]])
def test_chunks_give_the_token_of_the_whole(
    model: Transformer, runner: ModelRunner, blocks: BlockManager, chunks: list[int]
) -> None:
    """A neighbour that decodes in every step may not matter."""
    token_ids = random_tokens(9)
    neighbour = admit(blocks, [7], GREEDY)
    seq = admit(blocks, token_ids, GREEDY)
    for count in chunks:
        neighbour_result, result = run(runner, (neighbour, 1), (seq, count))
        assert neighbour_result.token_id == best_token(model, neighbour.token_ids)
        neighbour.num_computed_tokens += 1
        neighbour.token_ids.append(neighbour_result.token_id)
        assert blocks.grow(neighbour, neighbour.num_tokens)
        seq.num_computed_tokens += count
        assert (result.token_id is None) == (seq.num_uncomputed_tokens > 0)
    assert result.token_id == best_token(model, token_ids)


@pytest.mark.parametrize("chunks", [[300], [128, 128, 44], [129, 171], [1, 299], [299, 1]])
def test_scoring_covers_every_token_once_across_chunks_and_slices(
    model: Transformer, runner: ModelRunner, blocks: BlockManager, chunks: list[int]
) -> None:
    token_ids = random_tokens(300)
    seq = admit(blocks, token_ids, None)
    scored: list[float] = []
    for count in chunks:
        (result,) = run(runner, (seq, count))
        scored.extend(result.prompt_logprobs)
        seq.num_computed_tokens += count
    rows = log_softmax(model, token_ids)[:-1]
    expected = rows.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    assert len(scored) == 299
    assert float((torch.tensor(scored) - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize(
    ("params", "suppressed"),
    [
        (replace(GREEDY, min_tokens=2), True),
        (replace(GREEDY, min_tokens=1), False),
        (replace(GREEDY, min_tokens=2, ignore_eos=True), False),
        (replace(GREEDY, min_tokens=2, ignore_eos=True, stop_token_ids=(EOS,)), True),
        (replace(GREEDY, stop_token_ids=(EOS,)), False),
    ],
)
def test_whatever_would_end_is_held_back_until_min_tokens(
    runner: ModelRunner, blocks: BlockManager, params: SamplingParams, suppressed: bool
) -> None:
    """One token of output is there; end-of-sequence would be the next."""
    seq = admit(blocks, [1, 2], replace(params, logit_bias={EOS: 100.0}))
    seq.token_ids.append(3)
    (result,) = run(runner, (seq, 3))
    assert (result.token_id != EOS) == suppressed


@pytest.mark.parametrize(
    "params",
    [
        replace(GREEDY, repetition_penalty=5.0),
        replace(GREEDY, presence_penalty=2.0),
        replace(GREEDY, frequency_penalty=2.0),
        replace(GREEDY, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=-1.0),
        replace(GREEDY, logit_bias={5: 20.0, 6: 21.0}, repetition_penalty=2.0),
        replace(GREEDY, allowed_token_ids=(5, 6, 7)),
        replace(GREEDY, logprobs=4),
    ],
    ids=["repetition", "presence", "frequency", "penalties", "bias", "allowed", "logprobs"],
)
def test_settings_reach_the_sampler_with_prompt_and_output_apart(
    model: Transformer, runner: ModelRunner, blocks: BlockManager, params: SamplingParams
) -> None:
    prompt, output = [5, 5, 9, 77], [6, 6, 6, 30]
    # Make tokens of prompt and output likely, so that penalties decide.
    bias = {5: 12.0, 6: 11.5, 9: 11.0, 30: 10.5, **params.logit_bias}
    seq = admit(blocks, prompt, replace(params, logit_bias=bias))
    seq.token_ids.extend(output)
    assert blocks.grow(seq, seq.num_tokens)
    (result,) = run(runner, (seq, 8))
    logits = model.logits(torch.tensor([[*prompt, *output]]))[0, -1:]
    (expected,) = sample(
        logits.clone(),
        [
            SamplingRow(
                temperature=0.0,
                repetition_penalty=params.repetition_penalty,
                presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty,
                logit_bias=bias,
                allowed_token_ids=params.allowed_token_ids,
                prompt_token_ids=prompt,
                output_token_ids=output,
                num_logprobs=params.logprobs,
            )
        ],
    )
    assert result.token_id == expected.token_id
    if params.logprobs is None:
        assert result.logprobs is None
    else:
        assert result.logprobs is not None
        assert result.logprobs.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [token for token, _ in result.logprobs.top] == [
            token for token, _ in expected.top_logprobs
        ]


def test_settings_of_one_row_do_not_reach_another(
    model: Transformer, runner: ModelRunner, blocks: BlockManager
) -> None:
    token_ids = random_tokens(5)
    seqs = [
        admit(blocks, token_ids, params)
        for params in (
            replace(GREEDY, logit_bias={1: 100.0}),
            GREEDY,
            replace(GREEDY, allowed_token_ids=(2,)),
            GREEDY,
        )
    ]
    results = run(runner, *((seq, 5) for seq in seqs))
    best = best_token(model, token_ids)
    assert [result.token_id for result in results] == [1, best, 2, best]


def test_settings_of_one_step_do_not_reach_another(
    runner: ModelRunner, blocks: BlockManager
) -> None:
    for params, expected in (
        (GREEDY, None),
        (replace(GREEDY, logit_bias={1: 100.0}), 1),
        (GREEDY, None),
        (replace(GREEDY, allowed_token_ids=(2,)), 2),
    ):
        (result,) = run(runner, (admit(blocks, [7], params), 1))
        assert result.token_id == expected or expected is None


def test_a_draw_takes_one_random_number_per_token_and_none_before(
    runner: ModelRunner, blocks: BlockManager
) -> None:
    seq = admit(blocks, random_tokens(6), SamplingParams(seed=11))
    expected = random.Random(11)
    assert seq.rng is not None
    run(runner, (seq, 4))
    assert seq.rng.getstate() == expected.getstate()
    seq.num_computed_tokens = 4
    run(runner, (seq, 2))
    expected.random()
    assert seq.rng.getstate() == expected.getstate()


def test_rows_that_are_not_numbers_give_no_token(blocks: BlockManager) -> None:
    model = tiny_model(kernel="reference", broken_token=3)
    cache = KVCache(
        CONFIG, num_pages=256, block_size=BLOCK_SIZE, dtype=model.dtype, device=model.device
    )
    runner = ModelRunner(model, cache, eos_token_ids=frozenset())
    broken, sound = admit(blocks, [3], GREEDY), admit(blocks, [4], GREEDY)
    results = run(runner, (broken, 1), (sound, 1))
    assert results[0].token_id is None
    assert results[1].token_id == best_token(model, [4])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("weight_dtype", ["auto", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_hidden_states_that_are_not_numbers_give_no_token(
    blocks: BlockManager,
    bad: float,
    dtype: torch.dtype,
    softcap: float | None,
    weight_dtype: Any,
    tied: bool,
) -> None:
    """Whatever the way to the logits hides."""
    if weight_dtype == "int8" and why_unavailable() is not None:
        pytest.skip("weights of 8 bits need the library")
    config = CONFIG.replace(logit_softcap=softcap, tie_word_embeddings=tied)
    model = random_model(config, seed=1, dtype=dtype)
    with torch.no_grad():
        assert model.final_norm is not None
        model.final_norm.weight[0] = bad
    cache = KVCache(CONFIG, num_pages=256, block_size=BLOCK_SIZE, dtype=dtype, device=model.device)
    runner = ModelRunner(model, cache, eos_token_ids=frozenset(), weight_dtype=weight_dtype)
    results = run(runner, (admit(blocks, [3], GREEDY), 1), (admit(blocks, [4], GREEDY), 1))
    assert [result.failed for result in results] == [True, True]
