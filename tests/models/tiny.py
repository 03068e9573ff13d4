"""Models so small that a test costs milliseconds, and a runner that feeds them step by step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.config import HeadConfig, ModelConfig
from models.kernels import KernelName
from models.kv_cache import AttentionMetadata, KVCache
from models.transformer import Transformer, random_model

_LLAMA = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    layers=(HeadConfig(num_heads=4, num_kv_heads=2, head_dim=8),) * 2,
    max_position_embeddings=64,
    norm="rms_norm",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    rope_theta=10_000.0,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    tie_word_embeddings=False,
)


def llama(**changes: object) -> ModelConfig:
    """Rotary positions, grouped-query."""
    return _LLAMA.replace(**changes)


def gpt2(**changes: object) -> ModelConfig:
    """Learned positions, multi-head, biases everywhere."""
    heads = HeadConfig(num_heads=3, num_kv_heads=3, head_dim=8)
    return _LLAMA.replace(
        family="gpt2",
        layers=(heads,) * 2,
        norm="layer_norm",
        activation="gelu_tanh",
        gated_mlp=False,
        rope_theta=None,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ).replace(**changes)


def model(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    kernel: KernelName = "auto",
    seed: int = 1,
) -> Transformer:
    """Every parameter random, norms and biases too, so that leaving one out is seen."""
    built = random_model(config, seed=seed, kernel=kernel)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim == 1:
                centre = 0.0 if name.endswith("bias") else 1.0
                parameter.normal_(centre, 0.2, generator=generator)
    return built.to(dtype).requires_grad_(False)


@torch.inference_mode()
def paged_logits(
    built: Transformer,
    sequences: Sequence[Tensor],
    steps: Sequence[Sequence[int]],
    *,
    block_size: int = 4,
    seed: int = 0,
) -> list[Tensor]:
    """Logits `[tokens, vocab]` of each sequence, computed through the cache.

    Args:
        sequences: token ids.
        steps: for each step, how many tokens of each sequence are computed in it.
    """
    blocks_each = [-(-len(tokens) // block_size) for tokens in sequences]
    num_blocks = sum(blocks_each) + 2
    shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = [[shuffled.pop() for _ in range(count)] for count in blocks_each]
    cache = KVCache(
        built.config,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=built.dtype,
        device=built.device,
    )
    computed = [0] * len(sequences)
    parts: list[list[Tensor]] = [[] for _ in sequences]
    for counts in steps:
        # Decodes first, as the metadata wants it.
        order = sorted((i for i, n in enumerate(counts) if n), key=lambda i: counts[i] != 1)
        spans = [range(computed[i], computed[i] + counts[i]) for i in order]
        metadata = AttentionMetadata.build(
            block_tables=[tables[i] for i in order],
            num_computed_tokens=[computed[i] for i in order],
            num_new_tokens=[counts[i] for i in order],
            block_size=block_size,
            device=built.device,
        )
        hidden = built(
            torch.cat([sequences[i][span] for i, span in zip(order, spans, strict=True)]),
            torch.cat([torch.tensor(span) for span in spans]),
            cache,
            metadata,
        )
        rows = torch.split(built.project_to_vocab(hidden), [len(span) for span in spans])
        for i, row in zip(order, rows, strict=True):
            parts[i].append(row)
            computed[i] += counts[i]
    assert computed == [len(tokens) for tokens in sequences], "the steps must cover all tokens"
    return [torch.cat(part) for part in parts]
