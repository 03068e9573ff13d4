"""The layers of a decoder as one call (`decoder_stack.cpp`).

While a layer is computed its weights go through the caches of the processor, so that Python, between
any two of its operations, would wait for memory: of one sequence, a fifth of a step.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import Attention
from models.attention_metadata import AttentionMetadata
from models.config import MAX_WINDOW
from models.cpu.fused import can_fuse
from models.decoder_layer import DecoderLayer
from models.kv_cache import CachePart, KVCache
from models.layers import MLP, RMSNorm
from models.linear import Linear
from models.positions import RopeConfig


class DecoderStack:
    """Layers as they are, with a cache. What they compute is to the bit what the modules would.

    A copy of a model makes its own.
    """

    def __init__(self, layers: nn.ModuleList, cache: KVCache) -> None:
        self._layers, self._cache = layers, cache
        self._stack = torch.classes.headroom.DecoderStack()
        # What the layers are made of: with another piece, or watched by a hook, they are others.
        self._pieces = list(_pieces(layers))
        self._hooks = [
            hooks
            for module in layers.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks)  # noqa: SLF001, torch's
        ]
        ropes = {layer.attention.heads.rope for layer in _decoder_layers(layers)}
        self._ropes: list[RopeConfig] = [rope for rope in ropes if rope is not None]
        for layer, (part,) in zip(_decoder_layers(layers), cache.layers, strict=True):
            self._add(layer, part)

    @staticmethod
    def can_be(layers: nn.ModuleList, cache: KVCache) -> bool:
        """Whether the layers are made of nothing but what the operations in C++ compute, and nobody
        wants to see what is between them."""
        return all(
            len(parts) == 1 and _is_plain(layer)
            for layer, parts in zip(_decoder_layers(layers), cache.layers, strict=True)
        ) and not any(
            module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001
            for module in layers.modules()
        )

    def is_current(self, layers: nn.ModuleList, cache: KVCache) -> bool:
        """Whether it still describes them."""
        return (
            self._layers is layers
            and self._cache is cache
            and all(owner.get(name) is piece for owner, name, piece in self._pieces)
            and not any(self._hooks)
        )

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

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None

    def _add(self, layer: DecoderLayer, part: CachePart) -> None:
        attention, scoring = layer.attention, layer.attention.scoring
        heads, numbers = attention.heads, attention.scoring.numbers(attention.heads.num_heads)
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
            [] if scoring.sinks is None else scoring.sinks.tolist(),
            min(scoring.sink_tokens, MAX_WINDOW),
            scoring.softcap or 0.0,
        )


def _decoder_layers(layers: nn.ModuleList) -> Iterator[DecoderLayer]:
    for layer in layers:
        assert isinstance(layer, DecoderLayer)
        yield layer


def _is_plain(layer: DecoderLayer) -> bool:
    attention, mlp, dtype = layer.attention, layer.mlp, layer.attention.qkv.dtype
    return (
        layer.residual == "pre_norm"
        and layer.residual_scale == 1.0
        and not layer.parallel
        and all(
            isinstance(norm, RMSNorm) and norm.fused(dtype) is not None
            for norm in (layer.attention_norm, layer.mlp_norm)
        )
        and isinstance(mlp, MLP)
        and mlp.gate is not None
        and mlp.gate.fused(dtype) is not None
        and all(
            isinstance(linear, Linear) and linear.is_packed and linear.dtype == dtype
            for linear in _linears(layer)
        )
        and len({linear.packed.int8 is None for linear in _linears(layer)}) == 1
        and attention.query_norm is None
        and attention.heads.clip_qkv is None
        and attention.kernel_name == "paged_cpu"
    )


def _linears(layer: DecoderLayer) -> list[Linear]:
    attention, mlp = layer.attention, layer.mlp
    assert isinstance(mlp, MLP)
    return [attention.qkv, attention.output, mlp.up, mlp.down]


def _pieces(layers: nn.ModuleList) -> Iterator[tuple[Mapping[str, Any], str, object]]:
    """Whatever could be replaced: where it is kept, by which name, and what it is."""
    for module in layers.modules():
        for owner in (module._modules, module._parameters):  # noqa: SLF001
            for name, piece in owner.items():
                yield owner, name, piece
        own = vars(module)
        for name in _ATTRIBUTES.get(type(module), ()):
            yield own, name, own.get(name)


_ATTRIBUTES = {Linear: ("_packed",), Attention: ("heads", "_scoring", "_kernel")}
