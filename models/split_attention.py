"""The same attention head by head (the "logical split"): every head's own pattern and output.

`MultiHead(x) = Σ_h head_h(x) · W_O[h] + b_O`. Slower than the fused form and equal to it; only
here does the output of a single head exist as a tensor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import Attention
from models.kernels import reference
from models.kernels.reference import Attended
from models.scoring import Scoring


@dataclass(frozen=True, slots=True)
class SplitOutput:
    """What the heads of one layer did with one sequence.

    Attributes:
        output: `[tokens, hidden]`, equal to the fused module's output.
        head_outputs: `[heads, tokens, hidden]`, each head's contribution; they and the output
            bias sum to `output`.
        weights: `[heads, tokens, tokens]`, attention probabilities; 0 where nothing is seen.
        lse: `[heads, tokens]`, logarithm of the sum of the exponentiated scores.
    """

    output: Tensor
    head_outputs: Tensor
    weights: Tensor
    lse: Tensor


def attend_by_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
) -> Attended:
    """`reference.attend`, one query head after the other; the same arguments and results."""
    group = query.shape[1] // key.shape[1]
    heads: list[Attended] = []
    for head in range(query.shape[1]):
        kv_head = head // group
        heads.append(
            reference.attend(
                query[:, head : head + 1],
                key[:, kv_head : kv_head + 1],
                value[:, kv_head : kv_head + 1],
                scoring.of_heads([head]),
                visible=_of_head(visible, head),
                bias=_of_head(bias, head),
            )
        )
    return Attended(*(torch.cat(parts, dim=1) for parts in zip(*heads, strict=True)))


def split_attention(
    attention: Attention, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None
) -> SplitOutput:
    """Run one layer's attention head by head on one sequence `[tokens, hidden]`, without cache."""
    query, key, value = (part.transpose(0, 1)[None] for part in attention.project(hidden, rotation))
    scoring = attention.scoring
    positions = torch.arange(hidden.shape[0], device=hidden.device)[None]
    attended = attend_by_head(
        query,
        key,
        value,
        scoring,
        visible=scoring.visible(positions, positions),
        bias=scoring.bias(positions),
    )
    output_weights = attention.output.dense_weight.unflatten(1, (attention.heads.num_heads, -1))
    head_outputs = torch.einsum("htd,ohd->hto", attended.output[0], output_weights)
    output = head_outputs.sum(dim=0)
    if attention.output.bias is not None:
        output = output + attention.output.bias
    return SplitOutput(output, head_outputs, attended.weights[0], attended.lse[0])


def _of_head(tensor: Tensor | None, head: int) -> Tensor | None:
    """One head of a mask or bias, or all of it where it holds for every head."""
    if tensor is None or tensor.shape[1] == 1:
        return tensor
    return tensor[:, head : head + 1]
