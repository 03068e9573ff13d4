"""Pooled hidden states through the paged engine: chunks, preemption, failures."""

from typing import Any

import pytest
import torch

from models.transformer import random_model
from service.engine.config import EngineConfig
from service.engine.engine import Engine, EngineRequest
from service.engine.errors import EncoderModelError
from service.engine.sequence import FinishReason, Pooling, SequenceOutput
from tests.engine import tiny
from tests.engine.tiny import finish_all, greedy, reason, tiny_engine, tiny_model


def _expected(token_ids: list[int], pooling: Pooling) -> torch.Tensor:
    with torch.inference_mode():
        hidden = tiny_model().forward_dense(torch.tensor([token_ids]))[0]
    match pooling:
        case Pooling.MEAN:
            return hidden.mean(dim=0)
        case Pooling.LAST:
            return hidden[-1]
        case Pooling.FIRST:
            return hidden[0]


def _embed(token_ids: list[int], pooling: Pooling = Pooling.MEAN) -> EngineRequest:
    return EngineRequest(token_ids, None, pooling=pooling)


def _difference(output: SequenceOutput, expected: torch.Tensor) -> float:
    return (torch.tensor(output.embedding) - expected).abs().max().item()


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("max_num_batched_tokens", [1, 3, 512])
def test_chunks_add_up(pooling: Pooling, max_num_batched_tokens: int) -> None:
    engine = tiny_engine(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=1)
    prompt = [(7 * i) % 250 for i in range(50)]
    output = finish_all(engine, [_embed(prompt, pooling)])[0]
    assert reason(output) is FinishReason.LENGTH
    assert not output.token_ids
    assert _difference(output, _expected(prompt, pooling)) <= 1e-5
    assert engine.load.kv_blocks_used == 0


@pytest.mark.parametrize("pooling", Pooling)
def test_preempted_and_computed_again(pooling: Pooling) -> None:
    """Generations grow until the embedding, last in order, has to give its blocks back."""
    num_preempted = 0

    def count(stats: object) -> None:
        nonlocal num_preempted
        num_preempted += stats.num_preempted  # type: ignore[attr-defined]

    engine = tiny_engine(num_blocks=26, max_num_batched_tokens=4, max_num_seqs=3, on_step=count)
    prompt = [(11 * i) % 250 for i in range(80)]
    requests = [
        EngineRequest([1, 2, 3], greedy(36), priority=1),
        EngineRequest([4, 5, 6], greedy(36), priority=1),
        _embed(prompt, pooling),
    ]
    output = finish_all(engine, requests)[-1]
    assert num_preempted > 0
    assert _difference(output, _expected(prompt, pooling)) <= 1e-5


def test_a_prefix_cache_supplies_no_token_whose_state_is_needed() -> None:
    engine = tiny_engine(enable_prefix_caching=True)
    prompt = list(range(40))
    first, second = (finish_all(engine, [_embed(prompt)])[0] for _ in range(2))
    assert first.embedding == second.embedding
    assert second.finish is not None
    assert second.finish.usage.cached_tokens == 0


def test_numbers_that_are_not_finite_end_it() -> None:
    engine = tiny_engine(tiny_model(broken_token=9))
    broken, fine = finish_all(engine, [_embed([1, 9, 2]), _embed([1, 2])])
    assert reason(broken) is FinishReason.ERROR
    assert reason(fine) is FinishReason.LENGTH


def _encoder(**config: Any) -> Engine:
    layers = tuple(
        type(heads)(heads.num_heads, heads.num_kv_heads, heads.head_dim, causal=False)
        for heads in tiny.CONFIG.layers
    )
    model_config = tiny.CONFIG.replace(layers=layers, max_position_embeddings=32)
    model = random_model(model_config, seed=1)
    return Engine(model, EngineConfig(num_blocks=64, block_size=4, **config))


def test_an_encoder_admits_whole_texts_only() -> None:
    engine = _encoder(max_num_batched_tokens=32, max_num_seqs=8)
    texts = [list(range(n)) for n in (20, 20, 12, 32, 5)]
    steps: list[list[int]] = []
    schedule = engine.scheduler.schedule

    def recorded() -> object:
        plan = schedule()
        steps.append([item.num_tokens for item in plan.scheduled])
        return plan

    engine.scheduler.schedule = recorded  # type: ignore[method-assign, assignment]
    outputs = finish_all(engine, [_embed(text) for text in texts])
    assert steps == [[20, 12], [20, 5], [32]]
    for text, output in zip(texts, outputs, strict=True):
        with torch.inference_mode():
            hidden = engine.model_runner.model.forward_dense(torch.tensor([text]))[0]
        assert _difference(output, hidden.mean(dim=0)) <= 1e-5


def test_an_encoder_neither_generates_nor_scores() -> None:
    engine = _encoder(max_num_batched_tokens=64)
    for params in (greedy(3), None):
        with pytest.raises(EncoderModelError):
            engine.add(EngineRequest([1, 2], params))
    assert not engine.has_unfinished


def test_an_encoder_needs_a_step_as_long_as_its_longest_text() -> None:
    with pytest.raises(ValueError, match=r"max_num_batched_tokens is 31.*max_model_len=32"):
        _encoder(max_num_batched_tokens=31, max_num_seqs=4)
    _encoder(max_num_batched_tokens=31, max_num_seqs=4, max_model_len=31)
