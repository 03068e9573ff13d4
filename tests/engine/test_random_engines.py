"""Random heads, pools, limits and arrivals: the tokens are those of the model alone."""

import dataclasses
import random

import pytest
import torch

from models.config import HeadConfig
from models.positions import Alibi, RopeConfig, alibi_slopes
from models.transformer import Transformer
from service.engine.config import EngineConfig
from service.engine.engine import Engine, EngineRequest
from service.engine.errors import NeverFitsError
from service.engine.sampling_params import SamplingParams
from service.engine.stats import StepStats
from tests.models import tiny

ROPE = RopeConfig(10_000.0, 8)
WINDOWED = HeadConfig(4, 2, 8, window=32, rope=ROPE)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def random_heads(rng: random.Random) -> HeadConfig:
    num_kv_heads, group, head_dim = (rng.choice(sizes) for sizes in ((1, 2), (1, 3), (4, 6, 10)))
    num_heads = num_kv_heads * group
    sizes = [rng.choice([None, 1, 2, 3, 5, 8, 17, 100]) for _ in range(num_heads)]
    alibi = Alibi(alibi_slopes(num_heads)) if rng.random() < 0.2 else None
    return HeadConfig(
        num_heads,
        num_kv_heads,
        head_dim,
        window=rng.choice([None, sizes[0], tuple(sizes), tuple(sizes)]),
        sink_tokens=rng.choice([0, 0, 1, 3, 9]),
        learned_sinks=rng.random() < 0.2,
        softcap=rng.choice([None, None, 2.0]),
        alibi=alibi,
        rope=None if alibi else RopeConfig(10_000.0, head_dim),
    )


def check_greedy(model: Transformer, prompt: list[int], token_ids: list[int]) -> None:
    """Each token is the likeliest, or as likely as rounding can tell, after those before it."""
    logits = model.logits(torch.tensor([prompt + token_ids]))[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(token_ids)[:, None]).squeeze(1)
    assert (logits.amax(dim=1) - chosen).max() <= 1e-4


@pytest.mark.parametrize("seed", range(40))
def test_random_engines_generate_what_the_model_says(seed: int) -> None:
    rng = random.Random(seed)
    layers = tuple(random_heads(rng) for _ in range(rng.choice([1, 2, 3])))
    model = tiny.model(tiny.llama(layers=layers), seed=seed)
    config = EngineConfig(
        block_size=rng.choice([1, 2, 3, 4, 7, 16]),
        num_blocks=rng.choice([8, 12, 20, 40]),
        max_num_seqs=rng.choice([1, 2, 4]),
        max_num_batched_tokens=rng.choice([4, 5, 8, 64]),
        enable_prefix_caching=rng.random() < 0.6,
    )
    engine = Engine(model, config)
    beginning = [rng.randrange(61) for _ in range(40)]
    prompts: dict[int, list[int]] = {}
    for _ in range(8):
        own = [rng.randrange(61) for _ in range(45)]
        prompt = (beginning[: rng.randrange(40)] + own)[: rng.randrange(1, 45)]
        request = EngineRequest(
            prompt, greedy(rng.randrange(1, 20)), priority=rng.choice([0, 0, 1]), timeout=1e4
        )
        try:
            prompts[engine.add(request)] = prompt
        except NeverFitsError:
            continue
    generated: dict[int, list[int]] = {seq_id: [] for seq_id in prompts}
    while engine.has_unfinished:
        for output in engine.step():
            generated[output.seq_id].extend(output.token_ids)
        engine.scheduler.check_integrity()
    for seq_id, prompt in prompts.items():
        check_greedy(model, prompt, generated[seq_id])
    assert engine.load.kv_blocks_used == 0


@pytest.mark.parametrize("num_blocks", range(56, 80, 2))
def test_a_chunk_of_an_urgent_prompt_may_take_the_blocks_of_a_planned_decode(
    num_blocks: int,
) -> None:
    """A decode grows in one group of heads while a prompt, read piece by piece, grows in the
    other; the prompt is first in the order, the decode first in the plan."""
    layers = (WINDOWED, dataclasses.replace(WINDOWED, window=None))
    model = tiny.model(tiny.llama(layers=layers, max_position_embeddings=256))
    engine = Engine(
        model,
        EngineConfig(block_size=4, num_blocks=num_blocks, max_num_batched_tokens=4, max_num_seqs=3),
    )
    prompts = {engine.add(EngineRequest([1, 2, 3], greedy(90))): [1, 2, 3]}
    for _ in range(2):
        engine.step()
    urgent = [token % 61 for token in range(130)]
    prompts[engine.add(EngineRequest(urgent, greedy(4), timeout=1e4))] = urgent
    generated: dict[int, list[int]] = {seq_id: [] for seq_id in prompts}
    while engine.has_unfinished:
        for output in engine.step():
            generated[output.seq_id].extend(output.token_ids)
        engine.scheduler.check_integrity()
    assert len(generated[1]) == 4
    check_greedy(model, urgent, generated[1])
    assert engine.load.kv_blocks_used == 0


@pytest.mark.parametrize("num_blocks", [30, 40, 60, 64])
def test_windowed_prompts_are_not_computed_again_and_again(num_blocks: int) -> None:
    """Whoever is admitted has room for what it will hold, so nobody takes it back."""
    heads = dataclasses.replace(WINDOWED, window=256)
    model = tiny.model(tiny.llama(layers=(heads,), max_position_embeddings=2048))
    steps: list[StepStats] = []
    engine = Engine(
        model,
        EngineConfig(num_blocks=num_blocks, max_num_batched_tokens=128, max_num_seqs=8),
        on_step=steps.append,
    )
    for first in range(4):
        engine.add(EngineRequest([first + 1] * 700, greedy(20)))
    while engine.has_unfinished:
        engine.step()
    assert sum(step.num_tokens for step in steps) == 4 * (700 + 20 - 1)
