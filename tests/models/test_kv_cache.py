"""What is written is read back, whatever blocks a sequence owns and in whatever steps it came."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import HeadConfig
from models.kv_cache import AttentionMetadata, KVCache
from tests.models import tiny

CPU = torch.device("cpu")
MIXED = (HeadConfig(4, 4, 8), HeadConfig(4, 2, 6), HeadConfig(4, 1, 2))


def make_cache(
    *, num_blocks: int = 6, block_size: int = 4, dtype: torch.dtype = torch.float32
) -> KVCache:
    return KVCache(
        tiny.llama(layers=MIXED),
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=dtype,
        device=CPU,
    )


@settings(max_examples=150)
@given(
    block_size=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_chunks_written_to_shuffled_blocks_are_read_back_in_order(
    block_size: int, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    blocks_each = [-(-length // block_size) for length in lengths]
    order = data.draw(st.permutations(range(sum(blocks_each))))
    tables = [[order.pop() for _ in range(count)] for count in blocks_each]
    layer = make_cache(num_blocks=sum(blocks_each), block_size=block_size).layers[1]
    generator = torch.Generator().manual_seed(seed)
    stored = [torch.randn(2, length, 2, 6, generator=generator) for length in lengths]
    computed = [0] * len(lengths)
    while computed != lengths:
        counts = [
            data.draw(st.integers(0, length - done))
            for length, done in zip(lengths, computed, strict=True)
        ]
        chosen = sorted((i for i, n in enumerate(counts) if n), key=lambda i: counts[i] != 1)
        if not chosen:
            counts = [length - done for length, done in zip(lengths, computed, strict=True)]
            chosen = sorted((i for i, n in enumerate(counts) if n), key=lambda i: counts[i] != 1)
        metadata = AttentionMetadata.build(
            block_tables=[tables[i] for i in chosen],
            num_computed_tokens=[computed[i] for i in chosen],
            num_new_tokens=[counts[i] for i in chosen],
            block_size=block_size,
            device=CPU,
        )
        new = [stored[i][:, computed[i] : computed[i] + counts[i]] for i in chosen]
        key, value = torch.cat(new, dim=1)
        layer.write(key, value, metadata.slot_mapping)
        for i in chosen:
            computed[i] += counts[i]
    for table, both, length in zip(tables, stored, lengths, strict=True):
        key, value = layer.gather(torch.tensor(table))
        assert torch.equal(key.transpose(0, 1)[:length], both[0])
        assert torch.equal(value.transpose(0, 1)[:length], both[1])


def test_gather_reads_a_rectangle_of_tables() -> None:
    layer = make_cache().layers[2]
    layer.key.copy_(torch.arange(layer.key.numel()).view_as(layer.key))
    layer.value.copy_(-layer.key)
    table = torch.tensor([[3, 0], [5, 1], [2, 2]])
    key, value = layer.gather(table)
    assert key.shape == value.shape == (3, 1, 8, 2)
    for row, blocks in enumerate(table.tolist()):
        expected = torch.cat([layer.key[block] for block in blocks], dim=1)
        assert torch.equal(key[row], expected)
        assert torch.equal(value[row], -expected)


def test_metadata_describes_decodes_and_chunks() -> None:
    metadata = AttentionMetadata.build(
        block_tables=[[7, 2], [4], [9, 1, 3, 8], [5, 6]],
        num_computed_tokens=[4, 0, 3, 0],
        num_new_tokens=[1, 1, 6, 2],
        block_size=4,
        device=CPU,
    )
    assert metadata.slot_mapping.tolist() == [
        2 * 4,  # position 4
        4 * 4,  # position 0
        *[9 * 4 + 3, 1 * 4, 1 * 4 + 1, 1 * 4 + 2, 1 * 4 + 3, 3 * 4],  # positions 3 to 8
        *[5 * 4, 5 * 4 + 1],  # positions 0 and 1
    ]
    assert metadata.slot_mapping.dtype == torch.int64
    assert metadata.num_decodes == 2
    assert metadata.decode_block_tables.tolist() == [[7, 2], [4, 4]], "padded with its own block"
    assert metadata.decode_mask.shape == (2, 1, 1, 8)
    assert metadata.decode_mask[:, 0, 0].tolist() == [
        [True] * 5 + [False] * 3,
        [True] + [False] * 7,
    ]
    spans = [(s.start, s.end, s.seq_len, s.block_table.tolist()) for s in metadata.prefills]
    assert spans == [(2, 8, 9, [9, 1, 3]), (8, 10, 2, [5])], "only the blocks in use"


def test_decode_tables_are_as_wide_as_the_longest_sequence_and_no_wider() -> None:
    metadata = AttentionMetadata.build(
        block_tables=[[1, 2, 3, 4], [5]],
        num_computed_tokens=[7, 2],
        num_new_tokens=[1, 1],
        block_size=4,
        device=CPU,
    )
    assert metadata.decode_block_tables.tolist() == [[1, 2], [5, 5]]
    assert metadata.decode_mask.sum(dim=-1).flatten().tolist() == [8, 3]


def test_a_batch_of_chunks_has_no_decodes() -> None:
    metadata = AttentionMetadata.build(
        block_tables=[[1]],
        num_computed_tokens=[0],
        num_new_tokens=[3],
        block_size=4,
        device=CPU,
    )
    assert metadata.num_decodes == 0
    assert metadata.decode_block_tables.shape == (0, 0)
    assert metadata.decode_mask.shape == (0, 1, 1, 0)


def test_decodes_come_before_chunks() -> None:
    with pytest.raises(AssertionError, match="decodes come first"):
        AttentionMetadata.build(
            block_tables=[[1], [2]],
            num_computed_tokens=[0, 0],
            num_new_tokens=[3, 1],
            block_size=4,
            device=CPU,
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_allocated_bytes_equal_the_formula(dtype: str) -> None:
    config = tiny.llama(layers=MIXED, dtype=dtype)
    cache = make_cache(num_blocks=5, block_size=3, dtype=getattr(torch, dtype))
    assert cache.nbytes == 5 * 3 * config.kv_bytes_per_token()
    assert [layer.key.shape[1:] for layer in cache.layers] == [(4, 3, 8), (2, 3, 6), (1, 3, 2)]


def test_blocks_start_as_zeros() -> None:
    for layer in make_cache().layers:
        assert not layer.key.any()
        assert not layer.value.any()


def test_layers_and_keys_and_values_share_no_memory() -> None:
    cache = make_cache()
    tensors = [tensor for layer in cache.layers for tensor in (layer.key, layer.value)]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
