"""Paged storage of keys and values: tensors only. Who owns which block is decided elsewhere."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.config import KV_SCALE_BYTES, ModelConfig
from models.kv_layout import KVLayout, LayerPart
from models.memory import large_zeros

if TYPE_CHECKING:
    from models.cpu.decoder_stack import DecoderStack

# What one gather copies at most where decodes share it: small enough to be read again from a
# cache of the CPU, large enough that calls cost little.
_GATHER_BYTES = 8 * 2**20
# Of smaller numbers 127 / x is infinite in float32.
_LEAST = 1e-35


class CachePart:
    """Keys and values of some heads of one layer, somewhere in each block of their group.

    Within a block they lie as `[2, kv_heads, block_size, head_dim]`, keys before values. Heads
    come before positions, so that one row copy per block and head gathers a sequence in the order
    in which attention reads it. Where they have 8 bits, float32 scales `[2, kv_heads, block_size]`
    lie behind them.

    Args:
        pool: the memory of all layers, one dimension.
        part: which heads, and where in a block.
        layout: how the pool is cut.
        dtype: of what is written and read.
        scratch: where gathered blocks are put together.

    Attributes:
        places: in elements, how far it is into a block, to the next page and to the next block;
            then blocks of a page, key/value heads, tokens of a block.
    """

    def __init__(
        self,
        pool: Tensor,
        part: LayerPart,
        layout: KVLayout,
        dtype: torch.dtype,
        scratch: "_Scratch",
    ) -> None:
        self.pool = pool
        self.part = part
        self.dtype = dtype
        self._scratch = scratch
        self.block_size = block_size = layout.block_size
        group = layout.groups[part.group]
        self.places = (
            *(part.offset, layout.page_elements, group.block_elements),
            *(group.blocks_per_page, len(part.kv_heads), block_size),
        )
        self._block_rows = _Rows(pool, self.places, block_size * part.head_dim)
        self._token_rows = _Rows(pool, self.places, block_size * part.head_dim, block_size)
        self._block_scales = self._token_scales = None
        if pool.dtype == torch.int8:
            behind = part.offset + 2 * len(part.kv_heads) * block_size * part.head_dim
            sizes = [size // KV_SCALE_BYTES for size in (behind, *self.places[1:3])]
            places, scales = (*sizes, *self.places[3:]), pool.view(torch.float32)
            self._block_scales = _Rows(scales, places, block_size)
            self._token_scales = _Rows(scales, places, block_size, block_size)

    def write(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store `[tokens, kv_heads, head_dim]` at slots `block * block_size + offset`."""
        both = torch.stack((key, value), dim=1)
        if self._token_scales is not None:
            both, scale = round_to_int8(both)
            self._token_scales.write(self._first_of_slots(self._token_scales, slot_mapping), scale)
        self._token_rows.write(self._first_of_slots(self._token_rows, slot_mapping), both)

    def clear(self, slots: Tensor) -> None:
        """Make `[tokens]` slots finite again."""
        for rows in (self._token_rows, self._token_scales):
            if rows is not None:
                rows.memory[rows.of_each(self._first_of_slots(rows, slots))] = 0

    def gather(self, block_tables: Tensor) -> tuple[Tensor, Tensor]:
        """Read whole blocks.

        Args:
            block_tables: `[batch, blocks]` block numbers.

        Returns:
            Keys and values, each `[batch, kv_heads, blocks * block_size, head_dim]`; the next
            gather from any part of the same cache may overwrite them.
        """
        both = self._gather(self._block_rows, block_tables, self._scratch)
        both = both.view(*both.shape[:3], -1, self.part.head_dim)
        if self._block_scales is not None:
            scale = self._gather(self._block_scales, block_tables, None)
            both = (both * scale[..., None]).to(self.dtype)
        key, value = both
        return key, value

    def _gather(self, blocks: "_Rows", block_tables: Tensor, scratch: "_Scratch | None") -> Tensor:
        """`[2, batch, kv_heads, elements]` of whole blocks."""
        num_heads = len(self.part.kv_heads)
        rows = blocks.first(block_tables)[None, :, None, :, None]
        rows = (rows + blocks.of_heads.view(2, 1, num_heads, 1, -1)).flatten()
        # index_select copies rows; plain indexing copies elements and is 20 times slower.
        shape = len(rows), blocks.memory.shape[1]
        read = blocks.memory.new_empty(shape) if scratch is None else scratch.take(*shape)
        torch.index_select(blocks.memory, 0, rows, out=read)
        return read.view(2, block_tables.shape[0], num_heads, -1)

    def _first_of_slots(self, rows: "_Rows", slots: Tensor) -> Tensor:
        """The row of the first head's key of each slot."""
        return rows.first(slots // self.block_size) + slots % self.block_size * rows.per_item


def round_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers and float32 scales `[...]` of `[..., width]`, whose product it is nearly: the
    nearest of 255 numbers as far apart as the largest one needs. What is not finite makes the scale
    so."""
    wide = x.float()
    largest = wide.abs().amax(dim=-1)
    # Of a number by a tensor, torch rounds twice.
    factor = torch.where(largest >= _LEAST, torch.full_like(largest, 127) / largest, 0.0)
    whole = (wide * factor[..., None]).round().nan_to_num().to(torch.int8)
    return whole, largest / 127


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

    Args:
        pool: as elements of the type that is copied.
        places: as in `CachePart`, in these elements.
        head_elements: from one head to the next.
        parts: how many pieces of a head are copied one by one.

    Attributes:
        per_item: rows that are copied at once.
        of_heads: rows, from the start of a block, of each head's keys, then of each head's values.
    """

    def __init__(
        self, pool: Tensor, places: Sequence[int], head_elements: int, parts: int = 1
    ) -> None:
        offset, page, block, self._blocks_per_page, num_heads, _ = places
        elements = head_elements // parts
        width = math.gcd(elements, offset, page, block)
        self.per_item = elements // width
        self.memory = pool.view(-1, width)
        self._page, self._block = page // width, block // width
        heads = torch.arange(2 * num_heads, device=pool.device)
        first = (offset + heads * head_elements) // width
        steps = torch.arange(self.per_item, device=pool.device)
        self.of_heads = (first[:, None] + steps).flatten()

    def first(self, blocks: Tensor) -> Tensor:
        """The row at which each block begins."""
        if self._blocks_per_page == 1:
            return blocks * self._page
        within = blocks % self._blocks_per_page
        return blocks // self._blocks_per_page * self._page + within * self._block

    def of_each(self, first: Tensor) -> Tensor:
        """Rows of the keys, then of the values, of all heads, from each `[items]` on."""
        return (first[:, None] + self.of_heads).flatten()

    def write(self, first: Tensor, items: Tensor) -> None:
        """Store `[items, 2, kv_heads, ...]`."""
        self.memory.index_copy_(0, self.of_each(first), items.view(-1, self.memory.shape[1]))


class KVCache:
    """One pool of pages for all layers, cut as `KVLayout` says.

    Memory starts as zeros, because masked positions are multiplied by 0 and must be finite.

    Args:
        dtype: of keys and values as they are written and read.

    Attributes:
        stack: the layers that compute with it as one call, if they do.
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
        kept = torch.int8 if config.kv_cache_dtype == "int8" else dtype
        self.pool = large_zeros(num_pages * self.layout.page_elements, kept, device)
        scratch = _Scratch(kept, device)
        self.stack: DecoderStack | None = None
        self.layers = tuple(
            tuple(CachePart(self.pool, part, self.layout, dtype, scratch) for part in parts)
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
        # Of 8 bits, they become float32 on the way.
        itemsize = 4 if self.pool.dtype == torch.int8 else self.pool.itemsize
        return tuple(_GATHER_BYTES // (width * itemsize) for width in widest)
