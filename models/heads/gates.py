"""Heads that are turned down, to what they hand on on average."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.transformer import HeadEdit, Transformer


@torch.inference_mode()
def head_means(model: Transformer, batches: Sequence[Tensor]) -> list[Tensor]:
    """What each head reads, on average over all tokens: `[heads, head_dim]` of each layer.

    Args:
        batches: int64 `[batch, tokens]` each.
    """
    sums: dict[int, Tensor] = {}

    def watch(layer: int, attended: Tensor) -> Tensor:
        read = attended.double().sum(dim=(0, 2))
        sums[layer] = sums[layer] + read if layer in sums else read
        return attended

    for ids in batches:
        model.forward_dense(ids, edit=watch)
    num_tokens = sum(ids.numel() for ids in batches)
    return [(sums[layer] / num_tokens).to(model.dtype) for layer in range(model.config.num_layers)]


def gate_heads(means: Sequence[Tensor], gates: Sequence[Tensor]) -> HeadEdit:
    """`mean + gate * (read - mean)`: a gate of 1 leaves heads as they are, 0 leaves their mean.

    Args:
        means: of `head_means`.
        gates: `[kv_heads]` or `[batch, kv_heads]` of each layer; the query heads of a group share
            one.
    """

    def edit(layer: int, attended: Tensor) -> Tensor:
        group = attended.shape[1] // gates[layer].shape[-1]
        gate = gates[layer].repeat_interleave(group, dim=-1)[..., None, None]
        change = (gate - 1) * (attended - means[layer][:, None])
        return attended + change.to(attended.dtype)

    return edit


def open_gates(model: Transformer) -> list[Tensor]:
    """Gates of 1, float32 `[kv_heads]` of each layer."""
    counts = [heads.num_kv_heads for heads in model.config.layers]
    return [torch.ones(count, device=model.device) for count in counts]


def text_loss(model: Transformer, input_ids: Tensor, edit: HeadEdit | None = None) -> Tensor:
    """Mean loss in nats per token of int64 `[batch, tokens]`."""
    logits = model.project_to_vocab(model.forward_dense(input_ids[:, :-1], edit=edit))
    return cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())
