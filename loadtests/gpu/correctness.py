"""Kernels and engine on a device against definitions computed in float64 by the host."""

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loadtests.gpu.shapes import random_on_device
from models.attention_metadata import AttentionMetadata
from models.before import Before
from models.config import HeadConfig, ModelConfig
from models.gpu import fused
from models.gpu.decode_graphs import Capture
from models.kernels import get_kernel
from models.kv_cache import KVCache
from models.scoring import Scoring
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.sampling_params import SamplingParams

_BLOCK_SIZE = 16
# Old and new tokens of each sequence: several spans, several tiles, the first token of all.
SEQUENCES = ((1030, 1), (0, 1), (511, 1), (512, 1), (3, 1), (500, 30), (0, 70))
HEADS = {
    "mha": HeadConfig(8, 8, 64),
    "gqa": HeadConfig(8, 2, 128),
    "mqa": HeadConfig(20, 1, 64),
    "window and sinks": HeadConfig(8, 2, 64, window=100, sink_tokens=4, learned_sinks=True),
    "soft-cap": HeadConfig(4, 4, 80, softcap=20.0),
}
# Of float32: what an order of sums may change; of others: times the error of plain operations.
_FLOAT32_BOUND = 1e-5
_RATIO_BOUND = 2.0
# Weights whose inputs are several tiles, whole ones and not, for every number of outputs at once.
PRODUCTS = ((600, 2500), (1400, 1000), (3000, 1280), (5200, 2560))
_ROWS = (1, 2, 8, 16, 64)
_EPS = 1e-5


@torch.inference_mode()
def attention_errors(
    heads: HeadConfig,
    dtype: torch.dtype,
    device: torch.device,
    sequences: tuple[tuple[int, int], ...] = SEQUENCES,
) -> dict[str, Any]:
    """Largest errors of `paged_triton`, and of plain operations in the same type."""
    generator = torch.Generator().manual_seed(0)
    blocks = [-(-(old + new) // _BLOCK_SIZE) for old, new in sequences]
    numbers = torch.randperm(sum(blocks), generator=generator).tolist()
    tables = [[[numbers.pop() for _ in range(count)]] for count in blocks]
    count = sum(new for _, new in sequences)
    query = torch.randn(count, heads.num_heads, heads.head_dim, generator=generator).to(dtype)
    sinks = torch.randn(heads.num_heads, generator=generator) if heads.learned_sinks else None
    content = None
    outputs = []
    for kernel, where, kind in (
        ("reference", torch.device("cpu"), torch.float64),
        ("reference", device, dtype),
        ("paged_triton", device, dtype),
    ):
        cache = KVCache(
            _config(heads), num_pages=sum(blocks), block_size=_BLOCK_SIZE, dtype=kind, device=where
        )
        if content is None:
            content = torch.randn(cache.pool.shape, generator=generator).to(dtype)
        cache.pool.copy_(content)
        metadata = AttentionMetadata.build(
            block_tables=tables,
            num_computed_tokens=[old for old, _ in sequences],
            num_new_tokens=[new for _, new in sequences],
            block_size=_BLOCK_SIZE,
            device=where,
        )
        scoring = Scoring(
            heads.softmax_scale,
            window=heads.window,
            sink_tokens=heads.sink_tokens,
            softcap=heads.softcap,
            sinks=None if sinks is None else sinks.to(where, kind),
        )
        attend = get_kernel(kernel)
        read = attend(query.to(where, kind), cache.layers[0][0], metadata.groups[0], scoring)
        outputs.append(read.double().cpu())
    exact, plain, ours = outputs
    theirs, error = ((output - exact).abs().max().item() for output in (plain, ours))
    bound = _FLOAT32_BOUND if dtype is torch.float32 else _RATIO_BOUND * theirs
    return {"ours": error, "plain": theirs, "bound": bound, "passed": error <= bound}


@torch.inference_mode()
def fused_errors(dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """Largest errors of products with what they do before and after, of norms and of gates, and of
    torch's operations in the same type."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for (outputs, inputs), count in itertools.product(PRODUCTS, _ROWS):
        weight, norm, x, doubled, residual = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in ((outputs, inputs), (inputs,), (count, inputs), (count, 2 * inputs),
                          (count, outputs))
        )  # fmt: skip
        given = ((weight * inputs**-0.5).to(dtype), norm, x, doubled, residual)
        there = tuple(part.to(device) for part in given)
        exact, plain = _by_torch(*(part.double() for part in given)), _by_torch(*there)
        for name, ours in _by_triton(*there).items():
            theirs, error = (
                (other.double().cpu() - exact[name]).abs().max().item()
                for other in (plain[name], ours)
            )
            allowed = max(_RATIO_BOUND * theirs, _FLOAT32_BOUND)
            rows.append(
                {"what": name, "rows": count, "weight": f"{outputs} x {inputs}"}
                | {"dtype": str(dtype).removeprefix("torch.")}
                | {"ours": error, "plain": theirs, "bound": allowed, "passed": error <= allowed}
            )
    return rows


def _by_torch(
    weight: Tensor, norm: Tensor, x: Tensor, doubled: Tensor, residual: Tensor
) -> dict[str, Tensor]:
    gate, value = doubled.chunk(2, dim=-1)
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:], norm, _EPS)
    gated = torch.nn.functional.silu(gate) * value
    return {
        "norm": normed,
        "gate": gated,
        "product": residual + x @ weight.T,
        "norm and product": normed @ weight.T,
        "gate and product": residual + gated @ weight.T,
    }


def _by_triton(
    weight: Tensor, norm: Tensor, x: Tensor, doubled: Tensor, residual: Tensor
) -> dict[str, Tensor]:
    """What a layer asks for with so many rows."""
    parts = {"norm": fused.rms_norm(x, norm, _EPS), "gate": fused.silu_mul(doubled)}
    if len(x) > fused.MAX_ROWS:
        return parts
    parts["product"] = fused.multiply(weight, x, residual=residual)
    if len(x) > 1:
        return parts
    before = Before(norm=norm, eps=_EPS), Before(swiglu=True)
    parts["norm and product"] = fused.multiply(weight, x, before=before[0])
    parts["gate and product"] = fused.multiply(weight, doubled, before=before[1], residual=residual)
    return parts


def engine_tokens(
    config: ModelConfig,
    device: torch.device,
    *,
    limits: EngineConfig,
    prompts: list[list[int]],
    num_tokens: int,
    capture: Capture | None = None,
) -> dict[str, Any]:
    """Greedy tokens of recorded steps, in float32, by how much less likely they are than the
    likeliest, in logits of the model without a cache."""
    model = random_on_device(config.replace(dtype="float32"), device)
    engine = Engine(model, replace(limits, kernel="paged_triton"), capture=capture)
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    worst = 0.0
    for prompt, output in zip(prompts, engine.generate(prompts, params), strict=True):
        tokens = torch.tensor([prompt + output.token_ids], device=device)
        logits = model.logits(tokens)[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, tokens[0, len(prompt) :, None])[:, 0]
        worst = max(worst, (logits.amax(dim=1) - chosen).max().item())
    return {
        "backend": engine.backend,
        "worst_logit_gap": worst,
        "passed": worst <= 1e-3 and engine.model_runner.graphs is not None,
    }


def _config(heads: HeadConfig) -> ModelConfig:
    """Of one layer; nothing but its cache is used."""
    return ModelConfig(
        family="llama",
        vocab_size=1,
        hidden_size=heads.num_heads * heads.head_dim,
        intermediate_size=1,
        layers=(heads,),
        max_position_embeddings=4096,
        norm="rms_norm",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        tie_word_embeddings=True,
    )
