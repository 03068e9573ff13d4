"""The layers of a decoder as one call (`decoder_stack.cpp`).

While a layer is computed its weights go through the caches of the processor, so that Python,
between any two of its operations, would wait for memory: of one sequence, a quarter of a step.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from operator import is_, methodcaller
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from models.attention import Attention
from models.attention_metadata import AttentionMetadata
from models.config import MAX_WINDOW
from models.decoder_layer import DecoderLayer
from models.kv_cache import CachePart, KVCache
from models.layers import MLP, RMSNorm
from models.linear import Linear
from models.positions import RopeConfig

# What a layer may be made of, by exactly these classes, and what of it decides what is computed.
_ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    DecoderLayer: ("residual", "residual_scale", "parallel"),
    Attention: ("heads", "_scoring", "_kernel"),
    MLP: ("gate",),
    RMSNorm: ("eps", "unit_offset"),
    Linear: ("_packed",),
}
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
)


class DecoderStack:
    """Layers as they are, with a cache. What they compute is to the bit what the modules would."""

    def __init__(self, layers: nn.ModuleList, cache: KVCache) -> None:
        self._layers = layers
        self._stack = torch.classes.headroom.DecoderStack()
        decoder_layers = list(_decoder_layers(layers))
        ropes = {layer.attention.heads.rope for layer in decoder_layers}
        self._ropes: list[RopeConfig] = [rope for rope in ropes if rope is not None]
        for layer, (part,) in zip(decoder_layers, cache.layers, strict=True):
            self._add(layer, part)
        # With another piece they would be other layers, and with a hook somebody looks in between.
        self._owners = [
            owner for module in layers.modules() for owner in (module._modules, module._parameters)
        ]
        self._sizes = [len(owner) for owner in self._owners]
        self._names = [name for owner in self._owners for name in owner]
        self._pieces = [piece for owner in self._owners for piece in owner.values()]
        attributes = [
            (vars(module), name)
            for module in layers.modules()
            for name in _ATTRIBUTES.get(type(module), ())
        ]
        self._holders = [own for own, _ in attributes]
        self._attribute_names = [name for _, name in attributes]
        self._attributes = [own.get(name) for own, name in attributes]
        self._hooks = [hooks for module in layers.modules() for hooks in _hooks_of(module)]

    @staticmethod
    def of(layers: nn.ModuleList, cache: KVCache) -> "DecoderStack | None":
        """The layers with this cache, which keeps them for the next step; None if something in them
        is not what the operations in C++ compute, or somebody watches what is in between."""
        stack = cache.stack
        if stack is None or not stack._is_of(layers):
            stack = DecoderStack(layers, cache) if _can_be_one(layers, cache) else None
            cache.stack = stack
        return stack

    def run(
        self,
        hidden: Tensor,
        rotations: Mapping[RopeConfig | None, tuple[Tensor, Tensor]],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Hidden states `[tokens, hidden]` before the first layer to those after the last; writes
        the cache."""
        turns = [rotations[rope] for rope in self._ropes]
        tables = [group.block_tables for group in metadata.groups]
        return self._stack.run(  # type: ignore[no-any-return]
            hidden,
            [cos for cos, _ in turns],
            [sin for _, sin in turns],
            [group.slot_mapping for group in metadata.groups],
            [table.block_tables for table in tables],
            [table.query_start for table in tables],
            [table.num_computed for table in tables],
        )

    def _is_of(self, layers: nn.ModuleList) -> bool:
        """Whether nothing has changed; asked in every step, so without a line of Python for each
        piece."""
        owners, values = self._owners, map(methodcaller("values"), self._owners)
        attributes = map(dict.get, self._holders, self._attribute_names)
        return (
            self._layers is layers
            and [*map(len, owners)] == self._sizes
            and [*chain.from_iterable(owners)] == self._names
            and all(map(is_, chain.from_iterable(values), self._pieces))
            and all(map(is_, attributes, self._attributes))
            and not any(self._hooks)
            and not any(_GLOBAL_HOOKS)
        )

    def _add(self, layer: DecoderLayer, part: CachePart) -> None:
        heads, scoring = layer.attention.heads, layer.attention.scoring
        numbers = scoring.numbers(heads.num_heads)
        linears = _linears(layer)
        packed = [linear.packed for linear in linears]
        int8 = [weight.int8 for weight in packed if weight.int8 is not None]
        norms = [norm for norm in (layer.attention_norm, layer.mlp_norm) if norm is not None]
        self._stack.add_layer(
            [weight.data for weight in packed],
            [each.scale for each in int8],
            [each.row_sums for each in int8],
            [weight.outputs for weight in packed],
            [linear.bias for linear in linears],
            [norm.weight for norm in norms],
            [norm.eps for norm in norms],
            heads.num_heads,
            -1 if heads.rope is None else self._ropes.index(heads.rope),
            heads.rope is not None and heads.rope.interleaved,
            part.part.group,
            part.pool,
            list(part.places),
            numbers.scales,
            numbers.windows,
            numbers.slopes,
            scoring.sinks,
            min(scoring.sink_tokens, MAX_WINDOW),
            scoring.softcap or 0.0,
        )


def _can_be_one(layers: nn.ModuleList, cache: KVCache) -> bool:
    return (
        all(type(layer) is DecoderLayer and _is_plain(layer) for layer in layers)
        and len(layers) == len(cache.layers)
        and all(len(parts) == 1 for parts in cache.layers)
        and not any(hooks for module in layers.modules() for hooks in _hooks_of(module))
        and not any(_GLOBAL_HOOKS)
    )


def _is_plain(layer: DecoderLayer) -> bool:
    attention, mlp, norms = layer.attention, layer.mlp, (layer.attention_norm, layer.mlp_norm)
    if (type(attention), type(mlp), *map(type, norms)) != (Attention, MLP, RMSNorm, RMSNorm):
        return False
    if not all(type(each) is Linear and each.is_packed for each in _projections(layer)):
        return False
    dtype, gate = attention.qkv.dtype, _mlp(layer).gate
    return (
        layer.residual == "pre_norm"
        and layer.residual_scale == 1.0
        and not layer.parallel
        and all(norm is not None and norm.fused(dtype) is not None for norm in norms)
        and gate is not None
        and gate.fused(dtype) is not None
        and len({(linear.dtype, linear.packed.int8 is None) for linear in _linears(layer)}) == 1
        and attention.query_norm is None
        and attention.heads.clip_qkv is None
        and attention.kernel_name == "paged_cpu"
    )


def _hooks_of(module: nn.Module) -> tuple[Mapping[int, Any], Mapping[int, Any]]:
    return module._forward_hooks, module._forward_pre_hooks


def _decoder_layers(layers: nn.ModuleList) -> Iterator[DecoderLayer]:
    for layer in layers:
        assert isinstance(layer, DecoderLayer)
        yield layer


def _mlp(layer: DecoderLayer) -> MLP:
    assert isinstance(layer.mlp, MLP)
    return layer.mlp


def _projections(layer: DecoderLayer) -> list[nn.Module]:
    mlp = _mlp(layer)
    return [layer.attention.qkv, layer.attention.output, mlp.up, mlp.down]


def _linears(layer: DecoderLayer) -> list[Linear]:
    """The projections of a layer that is plain."""
    return [cast(Linear, projection) for projection in _projections(layer)]
