"""Models whose key/value heads are copies of a few, hidden behind changes of basis."""

from dataclasses import replace

import torch
from torch import Tensor

from models.config import HeadConfig, ModelConfig
from models.heads.weights import HeadWeights
from models.positions import RopeConfig
from models.transformer import Transformer, random_model
from tests.models import tiny

NUM_HEADS = 6


def shape(**heads: object) -> ModelConfig:
    """Two layers of 6 query heads on 2 key/value heads of 8 dimensions."""
    rope = RopeConfig(10_000.0, 8)
    layer = replace(HeadConfig(NUM_HEADS, 2, 8, rope=rope), **heads)  # type: ignore[arg-type]
    return tiny.llama(layers=(layer,) * 2)


def grouped_model(config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model with random weights, biases too, whose attention is far from uniform."""
    model = random_model(config, seed=1, dtype=dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.weight"):
            parameter.mul_(2.0)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def hide(model: Transformer, *, turned: bool = True) -> tuple[Transformer, list[list[list[int]]]]:
    """The same function with a key/value head for each query head, in an order of its own and,
    if `turned`, in bases of their own; and which of its heads are copies of one."""
    generator = torch.Generator().manual_seed(3)
    config = model.config.replace(
        layers=tuple(replace(heads, num_kv_heads=heads.num_heads) for heads in model.config.layers)
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copies: list[list[list[int]]] = []
    for index, attention in enumerate(model.attentions):
        weights = HeadWeights.of(attention)
        group = attention.heads.num_queries_per_kv
        order = torch.randperm(NUM_HEADS, generator=generator)
        query = weights.query.flatten(0, 1)[order]
        output = weights.output.flatten(0, 1)[order]
        key, value = (
            w.repeat_interleave(group, dim=0)[order] for w in (weights.key, weights.value)
        )
        if turned:
            for head in range(NUM_HEADS):
                turn, basis = random_turn(attention.heads, generator), orthogonal(8, generator)
                query[head], key[head] = turn @ query[head], turn @ key[head]
                value[head], output[head] = basis @ value[head], output[head] @ basis.T
        expanded = HeadWeights(query[:, None], key, value, output[:, None])
        for name, tensor in expanded.parameters(attention).items():
            state[f"layers.{index}.attention.{name}"] = tensor
        owners = (order // group).tolist()
        copies.append(
            sorted(
                [h for h in range(NUM_HEADS) if owners[h] == kv]
                for kv in range(attention.heads.num_kv_heads)
            )
        )
    hidden = Transformer(config)
    hidden.load_state_dict(state, assign=True)
    return hidden.eval().requires_grad_(False), copies


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    matrix = torch.randn(size, size, dtype=torch.float64, generator=generator)
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis


def random_turn(heads: HeadConfig, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix that commutes with the rotations of positions, by loops."""
    rotary_dim = 0 if heads.rope is None else heads.rope.rotary_dim
    turn = torch.zeros(8, 8, dtype=torch.float64)
    turn[rotary_dim:, rotary_dim:] = orthogonal(8 - rotary_dim, generator)
    angles = 6.3 * torch.rand(rotary_dim // 2, dtype=torch.float64, generator=generator)
    for pair, angle in enumerate(angles):
        interleaved = heads.rope is not None and heads.rope.interleaved
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary_dim // 2)
        turn[a, a] = turn[b, b] = angle.cos()
        turn[a, b], turn[b, a] = -angle.sin(), angle.sin()
    return turn


def token_ids(seed: int = 0, *, batch: int = 4, num_tokens: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(61, (batch, num_tokens), generator=generator)


@torch.inference_mode()
def own_text(model: Transformer, *, rows: int = 16, num_tokens: int = 24) -> Tensor:
    """What the model writes itself, int64 `[rows, num_tokens]`: of this text no change makes it
    better, but for chance."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(61, (rows, 1), generator=generator)
    for _ in range(num_tokens - 1):
        likely = model.logits(ids)[:, -1].softmax(dim=-1)
        ids = torch.cat((ids, likely.multinomial(1, generator=generator)), dim=1)
    return ids
