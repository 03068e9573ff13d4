"""Paged storage of keys and values: tensors only. Who owns which block is decided elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, each `[num_blocks, kv_heads, block_size, head_dim]`.

    Heads come before positions, so that one row copy per block and head gathers a sequence in the
    order in which attention reads it.
    """

    key: Tensor
    value: Tensor

    def write(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store `[tokens, kv_heads, head_dim]` at slots `block * block_size + offset`."""
        rows = self._rows(slot_mapping)
        head_dim = self.key.shape[-1]
        self.key.view(-1, head_dim).index_copy_(0, rows, key.flatten(0, 1))
        self.value.view(-1, head_dim).index_copy_(0, rows, value.flatten(0, 1))

    def clear(self, slots: Tensor) -> None:
        """Make `[tokens]` slots finite again."""
        rows = self._rows(slots)
        self.key.view(-1, self.key.shape[-1])[rows] = 0
        self.value.view(-1, self.value.shape[-1])[rows] = 0

    def gather(self, block_table: Tensor) -> tuple[Tensor, Tensor]:
        """Read whole blocks.

        Args:
            block_table: `[..., blocks]` block numbers.

        Returns:
            Keys and values, each `[..., kv_heads, blocks * block_size, head_dim]`.
        """
        num_blocks, num_kv_heads, block_size, head_dim = self.key.shape
        heads = torch.arange(num_kv_heads, device=block_table.device)
        rows = block_table[..., None, :] * num_kv_heads + heads[:, None]
        shape = (*rows.shape[:-1], rows.shape[-1] * block_size, head_dim)
        # index_select copies rows; plain indexing copies elements and is 20 times slower.
        key, value = (
            part.view(num_blocks * num_kv_heads, block_size * head_dim)
            .index_select(0, rows.flatten())
            .view(shape)
            for part in (self.key, self.value)
        )
        return key, value

    def _rows(self, slots: Tensor) -> Tensor:
        """Rows of the cache, seen as `[num_blocks * kv_heads * block_size, head_dim]`."""
        _, num_kv_heads, block_size, _ = self.key.shape
        first = slots // block_size * (num_kv_heads * block_size) + slots % block_size
        heads = torch.arange(num_kv_heads, device=slots.device) * block_size
        return (first[:, None] + heads).flatten()


class KVCache:
    """One pool of blocks for all layers; layers may differ in their head counts.

    Blocks start as zeros, because masked positions are multiplied by 0 and must be finite.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers = tuple(
            LayerCache(
                *(
                    torch.zeros(
                        (num_blocks, heads.num_kv_heads, block_size, heads.head_dim),
                        dtype=dtype,
                        device=device,
                    )
                    for _ in range(2)
                )
            )
            for heads in config.layers
        )

    @property
    def nbytes(self) -> int:
        return sum(layer.key.nbytes + layer.value.nbytes for layer in self.layers)


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Several new tokens of one sequence: rows `start:end` of the packed batch."""

    start: int
    end: int
    seq_len: int
    block_table: Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of one step live in the cache, and what each may attend to.

    The packed batch holds sequences with exactly one new token first (decodes), then those with
    several (prefill chunks). A new token attends to all of its sequence up to itself.

    Attributes:
        slot_mapping: `[tokens]`, the cache slot of each new token.
        num_decodes: how many of the first rows are decodes.
        decode_block_tables: `[num_decodes, blocks]`, padded with a block of the same sequence, so
            that nothing of another sequence is ever read, not even under a mask.
        decode_mask: bool `[num_decodes, 1, 1, blocks * block_size]`, True may be attended to.
        prefills: the remaining rows.
    """

    slot_mapping: Tensor
    num_decodes: int
    decode_block_tables: Tensor
    decode_mask: Tensor
    prefills: tuple[PrefillSpan, ...]

    @staticmethod
    def build(
        *,
        block_tables: Sequence[Sequence[int]],
        num_computed_tokens: Sequence[int],
        num_new_tokens: Sequence[int],
        block_size: int,
        device: torch.device,
    ) -> "AttentionMetadata":
        """Describe a batch whose sequences are given in packed order, decodes first.

        Args:
            block_tables: blocks of each sequence, enough for its old and new tokens.
            num_computed_tokens: tokens of each sequence that the cache already holds.
            num_new_tokens: tokens of each sequence in this step, 1 or more.
        """
        num_decodes = sum(1 for count in num_new_tokens if count == 1)
        assert all(count == 1 for count in num_new_tokens[:num_decodes]), "decodes come first"
        slots: list[int] = []
        for table, computed, count in zip(
            block_tables, num_computed_tokens, num_new_tokens, strict=True
        ):
            for position in range(computed, computed + count):
                slots.append(table[position // block_size] * block_size + position % block_size)
        decode_lens = [computed + 1 for computed in num_computed_tokens[:num_decodes]]
        width = max((-(-length // block_size) for length in decode_lens), default=0)
        padded = [
            _padded(table, -(-length // block_size), width)
            for table, length in zip(block_tables, decode_lens, strict=False)
        ]
        spans: list[PrefillSpan] = []
        start = num_decodes
        for index in range(num_decodes, len(block_tables)):
            seq_len = num_computed_tokens[index] + num_new_tokens[index]
            used = block_tables[index][: -(-seq_len // block_size)]
            end = start + num_new_tokens[index]
            spans.append(PrefillSpan(start, end, seq_len, torch.tensor(used, device=device)))
            start = end
        positions = torch.arange(width * block_size, device=device)
        lens = torch.tensor(decode_lens, dtype=torch.int64, device=device)
        return AttentionMetadata(
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            num_decodes=num_decodes,
            decode_block_tables=torch.tensor(padded, dtype=torch.int64, device=device).view(
                num_decodes, width
            ),
            decode_mask=(positions < lens[:, None])[:, None, None, :],
            prefills=tuple(spans),
        )


def _padded(block_table: Sequence[int], num_used: int, width: int) -> list[int]:
    used = block_table[:num_used]
    return [*used, *[used[-1]] * (width - num_used)]
