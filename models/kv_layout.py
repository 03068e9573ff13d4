"""How one pool of memory is cut into blocks, when heads remember different stretches of the past.

Key/value heads that have to remember the same tokens (see `Retention`) form a *group*, over all
layers; a *block* of a group holds the keys and values of `block_size` tokens for all its heads.
Blocks of different groups differ in size, so the pool hands out *pages*: a page belongs to one
group at a time and is cut into its blocks. With one group, a page is a block. (Jenga, Zhang et
al. 2025, manages memory of different layer kinds by the same two levels.)

Integers only.
"""

import math
from dataclasses import dataclass

from models.config import HeadConfig, ModelConfig, Retention

# A page is at most so many of the largest blocks.
_MAX_BLOCKS_PER_PAGE = 64


@dataclass(frozen=True, slots=True)
class LayerPart:
    """Key/value heads of one layer that belong to one group.

    Attributes:
        offset: elements from the start of a block to the keys of the first head; all keys come
            first, then all values, then, where they have 8 bits, the scales of both in the same
            order.
    """

    layer: int
    group: int
    kv_heads: tuple[int, ...]
    head_dim: int
    offset: int


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Heads with one block table.

    Attributes:
        block_elements: keys and values in a block, and the scales behind them.
        blocks_per_page: blocks that a page is cut into.
    """

    retention: Retention
    block_elements: int
    blocks_per_page: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Where everything lies.

    Attributes:
        parts: for each layer, its heads by group; one part where all remember the same.
        page_elements: size of a page.
    """

    block_size: int
    groups: tuple[KVGroup, ...]
    parts: tuple[tuple[LayerPart, ...], ...]
    page_elements: int

    @staticmethod
    def of(config: ModelConfig, block_size: int) -> "KVLayout":
        every = [config.retentions(index) for index in range(config.num_layers)]
        retentions = list(dict.fromkeys(retention for own in every for retention in own))
        sizes = [0] * len(retentions)
        layers: list[tuple[LayerPart, ...]] = []
        for index, heads in enumerate(config.layers):
            parts: list[LayerPart] = []
            for retention, kv_heads in every[index].items():
                group = retentions.index(retention)
                parts.append(LayerPart(index, group, kv_heads, heads.head_dim, sizes[group]))
                sizes[group] += 2 * len(kv_heads) * block_size * config.kv_row_elements(heads)
            layers.append(tuple(parts))
        page_elements = _page_elements(sizes)
        groups = tuple(
            KVGroup(retention, size, page_elements // size)
            for retention, size in zip(retentions, sizes, strict=True)
        )
        return KVLayout(block_size, groups, tuple(layers), page_elements)


def query_heads(heads: HeadConfig, part: LayerPart) -> list[int]:
    """The query heads that read the key/value heads of a part."""
    size = heads.num_queries_per_kv
    return [kv_head * size + i for kv_head in part.kv_heads for i in range(size)]


def _page_elements(sizes: list[int]) -> int:
    """The smallest multiple of the largest block that the other blocks divide; where that is too
    large a page, the multiple that wastes least."""
    largest = max(sizes)
    exact = math.lcm(*sizes)
    if exact <= _MAX_BLOCKS_PER_PAGE * largest:
        return exact
    multiples = range(largest, (_MAX_BLOCKS_PER_PAGE + 1) * largest, largest)
    return min(multiples, key=lambda page: max(page % size for size in sizes) / page)
