"""Fewer key/value heads for a model that has been trained with many."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from models.config import HeadConfig, ModelConfig
from models.errors import ConfigError
from models.heads.alignment import align, similarity
from models.heads.grouping import contiguous_groups, similar_groups
from models.heads.inputs import head_inputs
from models.heads.refit import refit_outputs
from models.heads.weights import HeadWeights
from models.transformer import Transformer

MergeMethod: TypeAlias = Literal["first", "mean", "align"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """A model with fewer key/value heads.

    Attributes:
        groups: for each layer, the key/value heads of the original that became one.
    """

    model: Transformer
    groups: list[list[list[int]]]


@torch.inference_mode()
def convert(
    model: Transformer,
    num_kv_heads: int | Sequence[int],
    batches: Sequence[Tensor],
    *,
    method: MergeMethod = "align",
    regroup: bool = True,
    refit: bool = True,
) -> Conversion:
    """A copy of a model in which groups of key/value heads have become one.

    Query heads keep their weights, in another order where heads were regrouped. Layers that have
    the wanted number already stay as they are.

    Args:
        num_kv_heads: one number, or one for each layer; divisors of what the layers have.
        batches: int64 `[batch, tokens]` each, text to calibrate with.
        method: a group becomes its first head, the mean of its heads (Ainslie et al. 2023), or
            their mean after they have been aligned (Jin et al. 2025).
        regroup: put heads that are alike into a group; else neighbours.
        refit: fit the output projections to what the original's attention hands on.

    Raises:
        ConfigError: the numbers do not fit the model, or its heads cannot be merged.
    """
    counts = _counts(model.config, num_kv_heads)
    for heads in model.config.layers:
        _check_mergeable(heads)
    grams = _input_grams(model, batches)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers: list[HeadConfig] = []
    all_groups: list[list[list[int]]] = []
    changed: list[int] = []
    for index, (heads, count) in enumerate(zip(model.config.layers, counts, strict=True)):
        if count == heads.num_kv_heads:
            layers.append(heads)
            all_groups.append([[head] for head in range(count)])
            continue
        changed.append(index)
        attention = model.attentions[index]
        weights, gram = HeadWeights.of(attention), grams[index]
        groups = contiguous_groups(heads.num_kv_heads, count)
        if regroup:
            alike = similarity(weights, gram, heads, aligned=method == "align")
            groups = similar_groups(alike, count)
        if method == "align":
            weights = align(weights, groups, gram, heads)
        merged = _merge(weights, groups, first=method == "first")
        for name, tensor in merged.parameters(attention).items():
            state[f"layers.{index}.attention.{name}"] = tensor
        order = _query_order(heads, groups)
        if attention.sinks is not None:
            state[f"layers.{index}.attention.sinks"] = attention.sinks[order]
        layers.append(_merged_config(heads, count, order))
        all_groups.append(groups)
    result = Transformer(model.config.replace(layers=tuple(layers)))
    result.load_state_dict(state, assign=True)
    result.eval().requires_grad_(False)
    if refit:
        refit_outputs(result, model, changed, batches)
    return Conversion(result, all_groups)


def _counts(config: ModelConfig, num_kv_heads: int | Sequence[int]) -> list[int]:
    if isinstance(num_kv_heads, int):
        counts = [num_kv_heads] * config.num_layers
    else:
        counts = list(num_kv_heads)
    if len(counts) != config.num_layers:
        allowed = f"one number, or one for each of {config.num_layers} layers"
        raise ConfigError("num_kv_heads", counts, allowed)
    for layer, (count, heads) in enumerate(zip(counts, config.layers, strict=True)):
        if count < 1 or heads.num_kv_heads % count:
            raise ConfigError(
                f"num_kv_heads of layer {layer}", count, f"a divisor of {heads.num_kv_heads}"
            )
    return counts


def _check_mergeable(heads: HeadConfig) -> None:
    if heads.qk_norm is not None and heads.qk_norm.scope != "head":
        raise ConfigError("qk_norm", heads.qk_norm.scope, "head: heads must share its weights")
    if isinstance(heads.window, tuple):
        raise ConfigError("window", heads.window, "one number for all heads")
    for field in ("alibi", "clip_qkv"):
        if getattr(heads, field) is not None:
            raise ConfigError(field, getattr(heads, field), "none: it belongs to single heads")


def _input_grams(model: Transformer, batches: Sequence[Tensor]) -> list[Tensor]:
    """Of what the heads of each layer project, float64 `[inputs, inputs]`."""
    grams: list[Tensor] = []
    for ids in batches:
        for index, inputs in enumerate(head_inputs(model, ids)):
            hidden = inputs.hidden.flatten(0, 1).double()
            if model.config.qkv_bias:
                hidden = torch.cat((hidden, hidden.new_ones(len(hidden), 1)), dim=1)
            if index == len(grams):
                grams.append(hidden.new_zeros(hidden.shape[1], hidden.shape[1]))
            grams[index] += hidden.T @ hidden
    return grams


def _merge(weights: HeadWeights, groups: list[list[int]], *, first: bool) -> HeadWeights:
    """Query heads in the order of the groups; the mean of each group's keys and values."""
    merged = [group[:1] if first else group for group in groups]
    return HeadWeights(
        torch.stack([weights.query[group].flatten(0, 1) for group in groups]),
        torch.stack([weights.key[group].mean(dim=0) for group in merged]),
        torch.stack([weights.value[group].mean(dim=0) for group in merged]),
        torch.stack([weights.output[group].flatten(0, 1) for group in groups]),
    )


def _query_order(heads: HeadConfig, groups: list[list[int]]) -> list[int]:
    """The original's query heads in their new order."""
    size = heads.num_queries_per_kv
    return [kv * size + i for group in groups for kv in group for i in range(size)]


def _merged_config(heads: HeadConfig, num_kv_heads: int, order: list[int]) -> HeadConfig:
    temperature = heads.temperature
    if temperature is not None:
        temperature = tuple(temperature[head] for head in order)
    return dataclasses.replace(heads, num_kv_heads=num_kv_heads, temperature=temperature)
