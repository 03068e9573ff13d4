"""A tiny model with every real part, and engines around it."""

from collections.abc import Callable
from typing import Any

import torch

from models.config import HeadConfig, ModelConfig
from models.kernels import KernelName
from models.positions import RopeConfig
from models.transformer import Transformer, random_model
from service.engine.config import EngineConfig
from service.engine.engine import Engine, EngineRequest
from service.engine.sampling_params import SamplingParams
from service.engine.sequence import FinishReason, SequenceOutput
from service.engine.stats import StepStats

EOS = 257
MAX_LEN = 320
ROPE = RopeConfig(theta=10_000.0, rotary_dim=8)
CONFIG = ModelConfig(
    family="llama",
    vocab_size=259,
    hidden_size=32,
    intermediate_size=48,
    layers=(HeadConfig(4, 2, 8, rope=ROPE), HeadConfig(4, 1, 8, rope=ROPE)),
    max_position_embeddings=MAX_LEN,
    norm="rms_norm",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    tie_word_embeddings=False,
    eos_token_ids=(EOS,),
)


def tiny_model(*, kernel: KernelName = "auto", broken_token: int | None = None) -> Transformer:
    """A random model; whatever reads the embedding of `broken_token` is not a number."""
    model = random_model(CONFIG, seed=1, kernel=kernel)
    if broken_token is not None:
        with torch.no_grad():
            model.embed_tokens.weight[broken_token] = torch.nan
    return model


def tiny_engine(
    model: Transformer | None = None,
    *,
    on_step: Callable[[StepStats], None] = lambda stats: None,
    **config: Any,
) -> Engine:
    return Engine(
        model or tiny_model(),
        EngineConfig(**{"num_blocks": 256, "block_size": 4, **config}),
        on_step=on_step,
    )


def greedy(max_tokens: int | None = 12, **changes: Any) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **changes}
    )


def finish_all(engine: Engine, requests: list[EngineRequest]) -> list[SequenceOutput]:
    """Add all requests, step until all have ended; one merged output per request, in order."""
    collected: dict[int, list[SequenceOutput]] = {engine.add(request): [] for request in requests}
    while engine.has_unfinished:
        for output in engine.step():
            collected[output.seq_id].append(output)
    engine.scheduler.check_integrity()
    return [SequenceOutput.merge(outputs) for outputs in collected.values()]


def reason(output: SequenceOutput) -> FinishReason:
    assert output.finish is not None
    return output.finish.reason


def log_softmax(model: Transformer, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities `[tokens, vocab]` by the model without cache or engine."""
    return model.logits(torch.tensor([token_ids]))[0].log_softmax(dim=-1)
