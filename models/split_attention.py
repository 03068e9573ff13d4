"""The same attention head by head (the "logical split"): every head's own pattern and output.

`MultiHead(x) = Σ_h head_h(x) · W_O[h] + b_O`. Slower than the fused form and equal to it; only
here does the output of a single head exist as a tensor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import Attention


@dataclass(frozen=True, slots=True)
class SplitOutput:
    """What the heads of one layer did with one sequence.

    Attributes:
        output: `[tokens, hidden]`, equal to the fused module's output.
        head_outputs: `[heads, tokens, hidden]`, each head's contribution; they and the output
            bias sum to `output`.
        weights: `[heads, tokens, tokens]`, attention probabilities; 0 above the diagonal.
    """

    output: Tensor
    head_outputs: Tensor
    weights: Tensor


def split_attention(
    attention: Attention, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None
) -> SplitOutput:
    """Run one layer's attention head by head on one sequence `[tokens, hidden]`, without cache."""
    heads = attention.heads
    query, key, value = attention.project(hidden, rotation)
    num_tokens = hidden.shape[0]
    future = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=hidden.device).triu(1)
    head_outputs: list[Tensor] = []
    weights: list[Tensor] = []
    for head, output_weight in enumerate(attention.output.weight.split(heads.head_dim, dim=1)):
        kv_head = head // heads.num_queries_per_kv
        scores = query[:, head] @ key[:, kv_head].T * heads.softmax_scale
        pattern = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        weights.append(pattern)
        head_outputs.append(pattern @ value[:, kv_head] @ output_weight.T)
    stacked = torch.stack(head_outputs)
    output = stacked.sum(dim=0)
    if attention.output.bias is not None:
        output = output + attention.output.bias
    return SplitOutput(output=output, head_outputs=stacked, weights=torch.stack(weights))
