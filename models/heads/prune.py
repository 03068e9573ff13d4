"""A model without some of its heads."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from models.attention import Attention
from models.config import HeadConfig, ModelConfig
from models.errors import ConfigError
from models.heads.gates import head_means
from models.heads.weights import HeadWeights
from models.transformer import Transformer

T = TypeVar("T")


@torch.inference_mode()
def prune(
    model: Transformer,
    remove: Collection[tuple[int, int]],
    batches: Sequence[Tensor],
    *,
    fold_mean: bool = True,
) -> Transformer:
    """A copy of a model without some of its key/value heads and the query heads that read them.

    Args:
        remove: layer and key/value head of each.
        batches: int64 `[batch, tokens]` each, text over which means are taken.
        fold_mean: what the heads hand on on average becomes part of the bias of the output
            projection, which the model has afterwards; else they hand on nothing.

    Raises:
        ConfigError: there is no such head, a layer would have none left, its heads are normalised
            together, or there is no text to take means over.
    """
    kept = _kept(model.config, remove)
    if fold_mean and not batches:
        raise ConfigError("batches", list(batches), "one or more to take means over")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not remove:
        return _with_state(model.config, state)
    means = head_means(model, batches) if fold_mean else None
    layers: list[HeadConfig] = []
    for index, attention in enumerate(model.attentions):
        own = _pruned_parameters(attention, kept[index])
        if means is not None:
            own |= _biases(attention, kept[index], means[index])
        prefix = f"layers.{index}.attention."
        state |= {prefix + name: tensor for name, tensor in own.items()}
        layers.append(_pruned_config(attention.heads, kept[index]))
    config = model.config.replace(layers=tuple(layers))
    if fold_mean:
        # Llama's format has biases at all four projections of attention or at none.
        config = config.replace(output_bias=True, qkv_bias=True)
    return _with_state(config, state)


def _kept(config: ModelConfig, remove: Collection[tuple[int, int]]) -> list[list[int]]:
    """Key/value heads of each layer that stay."""
    kept = [list(range(heads.num_kv_heads)) for heads in config.layers]
    for layer, head in sorted(set(remove)):
        if not 0 <= layer < config.num_layers:
            raise ConfigError("layer to prune", layer, f"0 to {config.num_layers - 1}")
        if head not in range(config.layers[layer].num_kv_heads):
            allowed = f"0 to {config.layers[layer].num_kv_heads - 1}"
            raise ConfigError(f"key/value head to prune of layer {layer}", head, allowed)
        kept[layer].remove(head)
        if not kept[layer]:
            allowed = f"up to {config.layers[layer].num_kv_heads - 1} heads: each layer keeps one"
            raise ConfigError(f"heads to prune of layer {layer}", "all", allowed)
        norm = config.layers[layer].qk_norm
        if norm is not None and norm.scope == "all_heads":
            raise ConfigError("qk_norm", norm.scope, "a norm of each head: this one spans them all")
    return kept


def _pruned_parameters(attention: Attention, kept: list[int]) -> dict[str, Tensor]:
    weights = HeadWeights.of(attention)
    parts = (weights.query, weights.key, weights.value, weights.output)
    parameters = HeadWeights(*(part[kept] for part in parts)).parameters(attention)
    queries = _query_heads(attention.heads, kept)
    if attention.sinks is not None:
        parameters["sinks"] = attention.sinks[queries].clone()
    norm = attention.heads.qk_norm
    if norm is not None and norm.scope == "each_head":
        assert attention.query_norm is not None, "as its configuration says"
        assert attention.key_norm is not None, "as its configuration says"
        parameters["query_norm.weight"] = attention.query_norm.weight[queries].clone()
        parameters["key_norm.weight"] = attention.key_norm.weight[kept].clone()
    return parameters


def _biases(attention: Attention, kept: list[int], means: Tensor) -> dict[str, Tensor]:
    """Of the output projection, with what removed heads hand on on average; and of the others,
    zeros where there were none."""
    output = attention.output
    is_removed = torch.ones(attention.heads.num_heads, dtype=torch.bool)
    is_removed[_query_heads(attention.heads, kept)] = False
    of_removed = means.double() * is_removed[:, None].to(means.device)
    bias = output.dense_weight.double() @ of_removed.flatten()
    if output.bias is not None:
        bias = bias + output.bias
    biases = {"output.bias": bias.to(output.dtype)}
    if attention.qkv.bias is None:
        width = (attention.heads.num_queries_per_kv + 2) * len(kept) * attention.heads.head_dim
        biases["qkv.bias"] = bias.new_zeros(width, dtype=output.dtype)
    return biases


def _pruned_config(heads: HeadConfig, kept: list[int]) -> HeadConfig:
    queries = _query_heads(heads, kept)
    alibi = heads.alibi
    if alibi is not None:
        alibi = dataclasses.replace(alibi, slopes=_pick(alibi.slopes, queries))
    return dataclasses.replace(
        heads,
        num_heads=len(queries),
        num_kv_heads=len(kept),
        window=_pick(heads.window, queries) if isinstance(heads.window, tuple) else heads.window,
        temperature=None if heads.temperature is None else _pick(heads.temperature, queries),
        alibi=alibi,
    )


def _query_heads(heads: HeadConfig, kv_heads: list[int]) -> list[int]:
    size = heads.num_queries_per_kv
    return [kv * size + i for kv in kv_heads for i in range(size)]


def _pick(values: tuple[T, ...], indices: list[int]) -> tuple[T, ...]:
    return tuple(values[index] for index in indices)


def _with_state(config: ModelConfig, state: dict[str, Tensor]) -> Transformer:
    pruned = Transformer(config)
    pruned.load_state_dict(state, assign=True)
    return pruned.eval().requires_grad_(False)
