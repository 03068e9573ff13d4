"""What the heads of a model see: inputs, queries, keys, values and weights of each layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels import reference
from models.transformer import Transformer


class HeadInputs(NamedTuple):
    """Of one layer.

    Attributes:
        hidden: `[batch, tokens, hidden]`, what is projected.
        query: `[batch, heads, tokens, head_dim]`, rotated.
        key, value: `[batch, kv_heads, tokens, head_dim]`; keys are rotated.
    """

    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


@torch.inference_mode()
def head_inputs(model: Transformer, input_ids: Tensor) -> list[HeadInputs]:
    """What each layer's heads see of int64 `[batch, tokens]`."""
    batch, num_tokens = input_ids.shape
    seen: list[Tensor] = []

    def watch(_: Any, arguments: tuple[Any, ...]) -> None:
        hidden, before = arguments
        seen.append(hidden if before is None else before(hidden))

    handles = [each.qkv.register_forward_pre_hook(watch) for each in model.attentions]
    try:
        model.forward_dense(input_ids)
    finally:
        for handle in handles:
            handle.remove()
    positions = torch.arange(num_tokens, device=input_ids.device).repeat(batch)
    lengths = torch.full_like(positions, num_tokens)
    inputs: list[HeadInputs] = []
    for attention, hidden in zip(model.attentions, seen, strict=True):
        rope = attention.heads.rope
        rotation = None if rope is None else model.rotation(rope, positions, lengths)
        query, key, value = (
            part.unflatten(0, (batch, num_tokens)).transpose(1, 2)
            for part in attention.project(hidden, rotation)
        )
        inputs.append(HeadInputs(hidden.unflatten(0, (batch, num_tokens)), query, key, value))
    return inputs


@torch.inference_mode()
def attention_weights(model: Transformer, input_ids: Tensor) -> list[Tensor]:
    """Weights `[batch, heads, tokens, tokens]` of each layer, float32, of int64 `[batch, tokens]`.

    Memory grows with the square of the tokens.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    weights: list[Tensor] = []
    for attention, inputs in zip(model.attentions, head_inputs(model, input_ids), strict=True):
        scoring = attention.scoring
        attended = reference.attend(
            inputs.query,
            inputs.key,
            inputs.value,
            scoring,
            visible=scoring.visible(positions, positions),
            bias=scoring.bias(positions),
        )
        weights.append(attended.weights)
    return weights
