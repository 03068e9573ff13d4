"""A checked call to tensors, through the kernels, to arrays. Runs on the engine thread."""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models import masks
from models.attention import Attention
from models.decoder_layer import DecoderLayer
from models.kernels import dense, reference
from models.positions import RopeConfig
from models.rope import apply_rope, rotation
from models.scoring import Scoring
from models.split_attention import attend_by_head, split_attention
from models.transformer import Transformer
from service.attention.request import (
    AttentionCall,
    AttentionResult,
    HiddenInput,
    QKVInput,
    Variant,
    Wanted,
)
from service.tensors import WireArray


class _Computed(NamedTuple):
    """Tensors of a result; weights, lse and head outputs where the implementation has them."""

    output: Tensor
    weights: Tensor | None
    lse: Tensor | None
    head_outputs: Tensor | None
    backend: str


@torch.inference_mode()
def attend(call: AttentionCall, model: Transformer) -> AttentionResult:
    """Compute one attention on the model's device."""
    match call.input:
        case QKVInput() as given:
            assert call.variant is not None, "only a layer has a variant of its own"
            computed = _attend_qkv(given, call.variant, call.wanted, model.device)
        case HiddenInput() as given:
            computed = _attend_hidden(given, call.wanted, model)
    wanted = call.wanted
    return AttentionResult(
        output=_to_array(computed.output),
        weights=_to_array(computed.weights) if wanted.weights else None,
        lse=_to_array(computed.lse) if wanted.lse else None,
        head_outputs=_to_array(computed.head_outputs) if wanted.head_outputs else None,
        backend=computed.backend,
    )


def _attend_qkv(
    given: QKVInput, variant: Variant, wanted: Wanted, device: torch.device
) -> _Computed:
    query, key, value = (_to_tensor(a, device) for a in (given.query, given.key, given.value))
    query_positions, key_positions = _positions(variant, query, key)
    if variant.rope is not None:
        lengths = key_positions.amax(dim=1, keepdim=True) + 1
        query = _rotate(query, variant.rope, query_positions, lengths)
        key = _rotate(key, variant.rope, key_positions, lengths)
    scoring = _scoring(variant, query.shape[-1], device)
    plain = query.shape[2] == key.shape[2] and scoring.is_plain(key.shape[2])
    if plain and variant.hides_nothing and not wanted.scores:
        output = dense.attend(query, key, value, scoring, is_causal=query.shape[2] > 1)
        computed = _Computed(output, None, None, None, "dense")
    else:
        visible = _visible(variant, scoring, query_positions, key_positions)
        bias = scoring.bias(key_positions)
        if variant.bias is not None:
            added = _with_four_axes(variant.bias, device)
            bias = added if bias is None else bias + added
        computed = _attend(query, key, value, scoring, visible, bias, wanted)
    heads_first = computed.output
    return computed._replace(output=heads_first.permute(given.axes), head_outputs=heads_first)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    visible: Tensor,
    bias: Tensor | None,
    wanted: Wanted,
) -> _Computed:
    """Attention of heads-first tensors."""
    if not wanted.scores:
        output = dense.attend(query, key, value, scoring, visible=visible, bias=bias)
        return _Computed(output, None, None, None, "dense")
    by_scores = attend_by_head if wanted.split else reference.attend
    output, weights, lse = by_scores(query, key, value, scoring, visible=visible, bias=bias)
    return _Computed(output, weights, lse, None, "split" if wanted.split else "reference")


def _attend_hidden(given: HiddenInput, wanted: Wanted, model: Transformer) -> _Computed:
    layer = model.layers[given.layer]
    assert isinstance(layer, DecoderLayer)
    attention = layer.attention
    hidden = _to_tensor(given.hidden, model.device).to(model.dtype)
    rows = hidden if hidden.dim() == 3 else hidden[None]
    batch, num_tokens = rows.shape[:2]
    positions = torch.arange(num_tokens, device=model.device)
    turn = None
    if attention.heads.rope is not None:
        lengths = torch.full_like(positions, num_tokens)
        turn = model.rotation(attention.heads.rope, positions, lengths)
    if wanted.split:
        each = [split_attention(attention, row, turn) for row in rows]
        parts = [torch.stack([getattr(one, name) for one in each]) for name in _SPLIT_PARTS]
        computed = _Computed(parts[0], parts[1], parts[2], parts[3], "split")
    elif wanted.scores:
        computed = _fused_with_weights(attention, rows, turn, positions)
    else:
        every = None if turn is None else (turn[0].repeat(batch, 1, 1), turn[1].repeat(batch, 1, 1))
        output = attention.forward_dense(rows.flatten(0, 1), every, batch)
        computed = _Computed(output.unflatten(0, (batch, -1)), None, None, None, "dense")
    return computed._replace(output=computed.output.view_as(hidden))


_SPLIT_PARTS = ("output", "weights", "lse", "head_outputs")


def _fused_with_weights(
    attention: Attention, rows: Tensor, turn: tuple[Tensor, Tensor] | None, positions: Tensor
) -> _Computed:
    """One layer's attention `[batch, tokens, hidden]`, with all its scores."""
    projected = [attention.project(row, turn) for row in rows]
    query, key, value = (torch.stack(part).transpose(1, 2) for part in zip(*projected, strict=True))
    scoring, both = attention.scoring, (positions[None], positions[None])
    visible, bias = scoring.visible(*both), scoring.bias(positions[None])
    wanted = Wanted(weights=True)
    computed = _attend(query, key, value, scoring, visible, bias, wanted)
    read = computed.output.transpose(1, 2).flatten(-2)
    return computed._replace(output=attention.output(read))


def _scoring(variant: Variant, head_dim: int, device: torch.device) -> Scoring:
    def numbers(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    scale: float | Tensor = head_dim**-0.5 if variant.scale is None else variant.scale
    if variant.temperature:
        scale = scale * numbers(variant.temperature)
    return Scoring(
        scale=scale,
        causal=variant.causal,
        window=variant.window,
        sink_tokens=variant.sink_tokens,
        softcap=variant.softcap,
        alibi=variant.alibi,
        sinks=numbers(variant.sinks) if variant.sinks else None,
    )


def _positions(variant: Variant, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Positions `[batch, queries]` and `[batch, keys]`."""
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    if variant.key_positions is None:
        keys = torch.arange(num_keys, device=key.device)
    else:
        keys = _to_tensor(variant.key_positions, key.device)
    if variant.query_positions is not None:
        queries = _to_tensor(variant.query_positions, key.device)
    elif num_queries <= num_keys:
        queries = keys[..., num_keys - num_queries :]
    else:  # of no meaning: what depends on positions was refused
        queries = torch.zeros(num_queries, dtype=torch.int64, device=key.device)
    return queries.expand(batch, -1), keys.expand(batch, -1)


def _rotate(x: Tensor, rope: RopeConfig, positions: Tensor, lengths: Tensor) -> Tensor:
    """Rotate `[batch, heads, tokens, dim]` at `[batch, tokens]` positions."""
    batch, num_heads, num_tokens, _ = x.shape
    turn = rotation(rope, positions.flatten(), lengths.expand_as(positions).flatten())
    cos, sin = (part.to(x.dtype) for part in turn)
    packed = x.transpose(1, 2).flatten(0, 1)
    turned = apply_rope(packed, cos, sin, interleaved=rope.interleaved)
    return turned.view(batch, num_tokens, num_heads, -1).transpose(1, 2)


def _visible(
    variant: Variant, scoring: Scoring, query_positions: Tensor, key_positions: Tensor
) -> Tensor:
    """Which query sees which key, `[batch, heads or 1, queries, keys]`."""
    device, num_keys = key_positions.device, key_positions.shape[1]
    visible = scoring.visible(query_positions, key_positions)
    if variant.prefix_lengths:
        near = dataclasses.replace(scoring, causal=False).visible(query_positions, key_positions)
        visible = visible | (near & masks.padding(variant.prefix_lengths, num_keys, device=device))
    if variant.key_lengths:
        visible = visible & masks.padding(variant.key_lengths, num_keys, device=device)
    if variant.segment_ids is not None:
        segments = _to_tensor(variant.segment_ids, device).view(-1, num_keys)
        own = segments[:, -query_positions.shape[1] :]  # never a mask of keys by keys
        visible = visible & (own[:, None, :, None] == segments[:, None, None])
    if variant.visible is not None:
        visible = visible & _with_four_axes(variant.visible, device)
    return visible


def _with_four_axes(mask: WireArray, device: torch.device) -> Tensor:
    tensor = _to_tensor(mask, device)
    return tensor[None, None] if tensor.dim() == 2 else tensor


def _to_tensor(array: WireArray, device: torch.device) -> Tensor:
    values = array.values.astype(array.values.dtype.newbyteorder("="))
    if array.dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(values).to(device)


def _to_array(tensor: Tensor | None) -> WireArray:
    assert tensor is not None, "an implementation gives what it is asked for"
    name = str(tensor.dtype).removeprefix("torch.")
    stored = tensor.cpu().contiguous()
    if name == "bfloat16":
        return WireArray(name, stored.view(torch.int16).numpy().view(np.uint16))
    return WireArray(name, stored.numpy())
