"""Models so small that a test costs milliseconds, and a runner that feeds them step by step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.attention_metadata import AttentionMetadata
from models.config import HeadConfig, ModelConfig
from models.kernels import KernelName
from models.kv_cache import KVCache
from models.kv_layout import KVLayout
from models.positions import RopeConfig
from models.query_batch import RELEASED
from models.transformer import Transformer, random_model

_LLAMA = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    layers=(HeadConfig(4, 2, 8, rope=RopeConfig(10_000.0, 8)),) * 2,
    max_position_embeddings=64,
    norm="rms_norm",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
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
        learned_positions=64,
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
            if parameter.ndim == 1 or "norm" in name or name.endswith("bias"):
                # Where norms multiply by 1 + weight, large weights would amplify rounding.
                centre = 0.0 if name.endswith("bias") or config.norm_unit_offset else 1.0
                parameter.normal_(centre, 0.2, generator=generator)
    return built.to(dtype).requires_grad_(False)


@torch.inference_mode()
def paged_logits(
    built: Transformer,
    sequences: Sequence[Tensor],
    steps: Sequence[Sequence[int]],
    *,
    prompt_lengths: Sequence[int] | None = None,
    block_size: int = 4,
) -> list[Tensor]:
    """Logits `[tokens, vocab]` of each sequence; see `paged_hidden`."""
    hidden = paged_hidden(
        built, sequences, steps, prompt_lengths=prompt_lengths, block_size=block_size
    )
    return [built.project_to_vocab(rows) for rows in hidden]


@torch.inference_mode()
def paged_hidden(
    built: Transformer,
    sequences: Sequence[Tensor],
    steps: Sequence[Sequence[int]],
    *,
    prompt_lengths: Sequence[int] | None = None,
    block_size: int = 4,
    seed: int = 0,
) -> list[Tensor]:
    """Hidden states `[tokens, hidden]` of each sequence, computed through the cache.

    Blocks that leave the window of their heads are given back and overwritten with NaN, so that
    whoever still reads them is seen.

    Args:
        sequences: token ids.
        steps: for each step, how many tokens of each sequence are computed in it.
        prompt_lengths: tokens of each sequence that it began with, where the rotation depends on
            that; None is all of them.
    """
    layout = KVLayout.of(built.config, block_size)
    blocks_each = [-(-len(tokens) // block_size) for tokens in sequences]
    pages_each = [
        [-(-count // group.blocks_per_page) for group in layout.groups] for count in blocks_each
    ]
    num_pages = sum(map(sum, pages_each)) + 2
    pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = [
        [
            _blocks([pages.pop() for _ in range(count)], group.blocks_per_page)
            for count, group in zip(counts, layout.groups, strict=True)
        ]
        for counts in pages_each
    ]
    cache = KVCache(
        built.config,
        num_pages=num_pages,
        block_size=block_size,
        dtype=built.dtype,
        device=built.device,
    )
    began = prompt_lengths or [len(tokens) for tokens in sequences]
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
            torch.cat(
                [
                    torch.tensor(s).add(1).clamp_min(began[i])
                    for i, s in zip(order, spans, strict=True)
                ]
            ),
        )
        rows = torch.split(hidden, [len(span) for span in spans])
        for i, row in zip(order, rows, strict=True):
            parts[i].append(row)
            computed[i] += counts[i]
            _release(cache, tables[i], computed[i])
    assert computed == [len(tokens) for tokens in sequences], "the steps must cover all tokens"
    return [torch.cat(part) for part in parts]


def _blocks(pages: Sequence[int], blocks_per_page: int) -> list[int]:
    return [page * blocks_per_page + at for page in pages for at in range(blocks_per_page)]


def _release(cache: KVCache, tables: list[list[int]], num_computed: int) -> None:
    """Poison and forget the blocks that no later query may see."""
    size = cache.block_size
    for index, group in enumerate(cache.layout.groups):
        window, sinks = group.retention.window, group.retention.sink_tokens
        for at, block in enumerate(tables[index]):
            gone = window is not None and (at + 1) * size <= num_computed - window + 1
            if gone and at * size >= sinks and block != RELEASED:
                slots = torch.arange(block * size, (block + 1) * size)
                for part in (p for layer in cache.layers for p in layer if p.part.group == index):
                    heads = len(part.part.kv_heads)
                    poison = torch.full((size, heads, part.part.head_dim), torch.nan)
                    part.write(poison.to(cache.pool), poison.to(cache.pool), slots)
                tables[index][at] = RELEASED
