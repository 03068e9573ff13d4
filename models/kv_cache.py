"""Paged storage of keys and values: tensors only. Who owns which block is decided elsewhere."""

import itertools
import math

import torch
from torch import Tensor

from models.config import ModelConfig
from models.kv_layout import KVLayout, LayerPart
from models.memory import large_zeros

# What one gather copies at most where decodes share it: small enough to be read again from a
# cache of the CPU, large enough that calls cost little.
_GATHER_BYTES = 8 * 2**20


class CachePart:
    """Keys and values of some heads of one layer, somewhere in each block of their group.

    Within a block they lie as `[2, kv_heads, block_size, head_dim]`, keys before values. Heads
    come before positions, so that one row copy per block and head gathers a sequence in the order
    in which attention reads it.

    Args:
        pool: the memory of all layers, one dimension.
        part: which heads, and where in a block.
        layout: how the pool is cut.
        scratch: where gathered blocks are put together.

    Attributes:
        places: in elements, how far it is into a block, to the next page and to the next block;
            then blocks of a page, key/value heads, tokens of a block.
    """

    def __init__(
        self, pool: Tensor, part: LayerPart, layout: KVLayout, scratch: "_Scratch"
    ) -> None:
        self.pool = pool
        self.part = part
        self._scratch = scratch
        self.block_size = layout.block_size
        group = layout.groups[part.group]
        self.places = (
            *(part.offset, layout.page_elements, group.block_elements),
            *(group.blocks_per_page, len(part.kv_heads), layout.block_size),
        )
        self._block_rows = _Rows(pool, part, layout, layout.block_size * part.head_dim)
        self._token_rows = _Rows(pool, part, layout, part.head_dim)

    def write(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store `[tokens, kv_heads, head_dim]` at slots `block * block_size + offset`."""
        rows = self._slot_rows(slot_mapping)
        both = torch.stack((key, value), dim=1)
        self._token_rows.memory.index_copy_(0, rows, both.view(-1, self._token_rows.width))

    def clear(self, slots: Tensor) -> None:
        """Make `[tokens]` slots finite again."""
        self._token_rows.memory[self._slot_rows(slots)] = 0

    def gather(self, block_tables: Tensor) -> tuple[Tensor, Tensor]:
        """Read whole blocks.

        Args:
            block_tables: `[batch, blocks]` block numbers.

        Returns:
            Keys and values, each `[batch, kv_heads, blocks * block_size, head_dim]`; the next
            gather from any part of the same cache may overwrite them.
        """
        rows = self._block_rows.first(block_tables)[None, :, None, :, None]
        num_heads = len(self.part.kv_heads)
        rows = rows + self._block_rows.of_heads.view(2, 1, num_heads, 1, -1)
        # index_select copies rows; plain indexing copies elements and is 20 times slower.
        memory, rows = self._block_rows.memory, rows.flatten()
        read = self._scratch.take(len(rows), memory.shape[1])
        torch.index_select(memory, 0, rows, out=read)
        key, value = read.view(2, block_tables.shape[0], num_heads, -1, self.part.head_dim)
        return key, value

    def _slot_rows(self, slots: Tensor) -> Tensor:
        """Rows of the keys and values of `[tokens]` slots, token by token."""
        rows = self._token_rows
        first = rows.first(slots // self.block_size) + slots % self.block_size * rows.per_item
        return (first[:, None] + rows.of_heads).flatten()


class _Scratch:
    """Memory that is used again and again on a CPU, where new memory of this size would have to be
    mapped by the system each time, which takes longer than the copy. A GPU's allocator keeps its
    own."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def take(self, *shape: int) -> Tensor:
        """A tensor of any content; on a CPU it is the memory of the one before."""
        if self._memory.device.type != "cpu":
            return self._memory.new_empty(shape)
        size, held = math.prod(shape), self._memory.numel()
        if held < size:
            self._memory = self._memory.new_empty(0)  # gives the old memory back first
            self._memory = self._memory.new_empty(max(size, 2 * held))
        return self._memory[:size].view(shape)


class _Rows:
    """The pool as a matrix whose rows are, or add up to, what is copied at once.

    A row is the whole of it unless layers have head widths that do not divide each other.

    Attributes:
        width: elements of a row.
        per_item: rows that are copied at once.
        of_heads: rows, from the start of a block, of each head's keys, then of each head's values.
    """

    def __init__(self, pool: Tensor, part: LayerPart, layout: KVLayout, elements: int) -> None:
        group = layout.groups[part.group]
        starts = (part.offset, group.block_elements, layout.page_elements)
        self.width = math.gcd(elements, *starts)
        self.per_item = elements // self.width
        self.memory = pool.view(-1, self.width)
        self._page, self._block = layout.page_elements // self.width, starts[1] // self.width
        self._blocks_per_page = group.blocks_per_page
        head_elements = layout.block_size * part.head_dim
        heads = torch.arange(2 * len(part.kv_heads), device=pool.device)
        first = (part.offset + heads * head_elements) // self.width
        steps = torch.arange(self.per_item, device=pool.device)
        self.of_heads = (first[:, None] + steps).flatten()

    def first(self, blocks: Tensor) -> Tensor:
        """The row at which each block begins."""
        if self._blocks_per_page == 1:
            return blocks * self._page
        within = blocks % self._blocks_per_page
        return blocks // self._blocks_per_page * self._page + within * self._block


class KVCache:
    """One pool of pages for all layers, cut as `KVLayout` says.

    Memory starts as zeros, because masked positions are multiplied by 0 and must be finite.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.layout = KVLayout.of(config, block_size)
        self.pool = large_zeros(num_pages * self.layout.page_elements, dtype, device)
        scratch = _Scratch(dtype, device)
        self.layers = tuple(
            tuple(CachePart(self.pool, part, self.layout, scratch) for part in parts)
            for parts in self.layout.parts
        )

    @property
    def block_size(self) -> int:
        return self.layout.block_size

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes

    @property
    def tokens_per_gather(self) -> tuple[int, ...]:
        """For each group, how many tokens' keys and values decodes gather at once at most."""
        if self.pool.device.type != "cpu":
            return (2**62,) * len(self.layout.groups)  # one large call is best
        widest = [0] * len(self.layout.groups)
        for part in itertools.chain(*self.layout.parts):
            elements = 2 * len(part.kv_heads) * part.head_dim
            widest[part.group] = max(widest[part.group], elements)
        return tuple(_GATHER_BYTES // (width * self.pool.itemsize) for width in widest)
