"""Changes of basis that leave a model as it is and make its key/value heads alike.

What queries and keys are multiplied by must be orthogonal and, as they are rotated by position,
commute with those rotations: a turn of each rotated pair. Values may be multiplied by any
orthogonal matrix whose inverse goes into the output projection. After Jin et al. 2025.

How alike two heads are is judged on what they compute from calibration inputs. They are linear, so
the inputs' Gram matrix `[inputs, inputs]` tells everything.
"""

from dataclasses import replace

import torch
from torch import Tensor

from models.config import HeadConfig
from models.heads.weights import HeadWeights

_NUM_ROUNDS = 10


def align(
    weights: HeadWeights, groups: list[list[int]], gram: Tensor, heads: HeadConfig
) -> HeadWeights:
    """The same heads in other bases: those of a group as near to their mean as they can be
    (generalised Procrustes, Gower 1975)."""
    query, key, value = weights.query.clone(), weights.key.clone(), weights.value.clone()
    output = weights.output.clone()
    for group in groups:
        # Around the first member; then around the mean, which does not move far any more.
        key_mean, value_mean = key[group[0]], value[group[0]]
        for _ in range(_NUM_ROUNDS):
            for head in group:
                if heads.qk_norm is None:  # its weights belong to the basis
                    turn = key_turn(key_mean @ gram @ key[head].T, heads)
                    key[head], query[head] = turn @ key[head], turn @ query[head]
                turn = nearest_orthogonal(value_mean @ gram @ value[head].T)
                value[head], output[head] = turn @ value[head], output[head] @ turn.T
            key_mean, value_mean = key[group].mean(dim=0), value[group].mean(dim=0)
    return replace(weights, query=query, key=key, value=value, output=output)


def nearest_orthogonal(cross: Tensor) -> Tensor:
    """The orthogonal R `[d, d]` that brings R·y nearest to x, where `cross` is the sum of x·yᵀ
    (Schönemann 1966)."""
    left, _, right = torch.linalg.svd(cross)
    nearest: Tensor = left @ right
    return nearest


def key_turn(cross: Tensor, heads: HeadConfig) -> Tensor:
    """The same among the matrices that commute with the rotations of `heads`."""
    first, second = _pairs(heads)
    turn = torch.zeros_like(cross)
    angle = torch.atan2(*_turn_parts(cross, first, second))
    turn[first, first] = turn[second, second] = angle.cos()
    turn[first, second], turn[second, first] = -angle.sin(), angle.sin()
    rest = slice(2 * len(first), None)
    turn[rest, rest] = nearest_orthogonal(cross[rest, rest])
    return turn


def similarity(weights: HeadWeights, gram: Tensor, heads: HeadConfig, *, aligned: bool) -> Tensor:
    """How alike key/value heads are, `[kv_heads, kv_heads]`: the cosines of their keys and of
    their values, added; 2 for equal heads.

    Args:
        aligned: after each pair has been aligned as well as it can be.
    """
    num_heads = len(weights.key)
    result = gram.new_zeros(num_heads, num_heads)
    for states, is_key in ((weights.key, True), (weights.value, False)):
        crosses = torch.einsum("aik,kl,bjl->abij", states, gram, states)
        traces = crosses.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        norms = traces.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
        if not aligned or (is_key and heads.qk_norm is not None):
            reached = traces
        elif is_key:
            first, second = _pairs(heads)
            reached = torch.hypot(*_turn_parts(crosses, first, second)).sum(dim=-1)
            rest = slice(2 * len(first), None)
            reached = reached + torch.linalg.svdvals(crosses[..., rest, rest]).sum(dim=-1)
        else:
            reached = torch.linalg.svdvals(crosses).sum(dim=-1)
        result += reached / norms[:, None] / norms
    return result


def _turn_parts(cross: Tensor, first: list[int], second: list[int]) -> tuple[Tensor, Tensor]:
    """Sine and cosine, times the gain, of the best turn of each pair: `[..., pairs]`."""
    return (
        cross[..., second, first] - cross[..., first, second],
        cross[..., first, first] + cross[..., second, second],
    )


def _pairs(heads: HeadConfig) -> tuple[list[int], list[int]]:
    """The dimensions that are rotated together, the first and the second of each pair."""
    if heads.rope is None:
        return [], []
    rotary_dim = heads.rope.rotary_dim
    if heads.rope.interleaved:
        return list(range(0, rotary_dim, 2)), list(range(1, rotary_dim, 2))
    return list(range(rotary_dim // 2)), list(range(rotary_dim // 2, rotary_dim))
