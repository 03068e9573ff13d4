"""What is written is read back, whatever blocks a sequence owns and in whatever steps it came."""

import itertools
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention_metadata import AttentionMetadata, GroupMetadata
from models.config import HeadConfig
from models.kv_cache import CachePart, KVCache
from models.query_batch import RELEASED
from models.scoring import Scoring
from tests.models import tiny

CPU = torch.device("cpu")
MIXED = (HeadConfig(4, 4, 8), HeadConfig(4, 2, 6), HeadConfig(4, 1, 2))
# Widths that do not divide each other, and three groups whose blocks share pages unevenly.
WINDOWS = (
    HeadConfig(4, 4, 8, window=(3, None, None, 5)),
    HeadConfig(4, 2, 6, window=5),
    HeadConfig(3, 3, 10, window=(None, 3, None)),
)


def make_cache(
    *,
    layers: tuple[HeadConfig, ...] = MIXED,
    num_pages: int = 6,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
) -> KVCache:
    return KVCache(
        tiny.gpt2(layers=layers),
        num_pages=num_pages,
        block_size=block_size,
        dtype=dtype,
        device=CPU,
    )


def build(
    tables: list[list[int]], num_computed: list[int], num_new: list[int], *, block_size: int = 4
) -> GroupMetadata:
    """Metadata of a step with one group."""
    metadata = AttentionMetadata.build(
        block_tables=[[table] for table in tables],
        num_computed_tokens=num_computed,
        num_new_tokens=num_new,
        block_size=block_size,
        device=CPU,
    )
    return metadata.groups[0]


def all_parts(cache: KVCache) -> list[CachePart]:
    return list(itertools.chain(*cache.layers))


# Writing and reading


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
    (part,) = make_cache(num_pages=sum(blocks_each), block_size=block_size).layers[1]
    generator = torch.Generator().manual_seed(seed)
    stored = [torch.randn(2, length, 2, 6, generator=generator) for length in lengths]
    computed = [0] * len(lengths)
    while computed != lengths:
        counts = [
            data.draw(st.integers(0, length - done))
            for length, done in zip(lengths, computed, strict=True)
        ]
        if not any(counts):
            counts = [length - done for length, done in zip(lengths, computed, strict=True)]
        chosen = sorted((i for i, n in enumerate(counts) if n), key=lambda i: counts[i] != 1)
        metadata = build(
            [tables[i] for i in chosen],
            [computed[i] for i in chosen],
            [counts[i] for i in chosen],
            block_size=block_size,
        )
        new = [stored[i][:, computed[i] : computed[i] + counts[i]] for i in chosen]
        key, value = torch.cat(new, dim=1)
        part.write(key, value, metadata.slot_mapping)
        for i in chosen:
            computed[i] += counts[i]
    for table, both, length in zip(tables, stored, lengths, strict=True):
        key, value = part.gather(torch.tensor([table]))
        assert torch.equal(key[0].transpose(0, 1)[:length], both[0])
        assert torch.equal(value[0].transpose(0, 1)[:length], both[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("layers", [MIXED, WINDOWS], ids=["mixed", "windows"])
def test_every_part_has_memory_of_its_own(
    layers: tuple[HeadConfig, ...], block_size: int, dtype: torch.dtype
) -> None:
    """Each group owns one page; all slots of all parts are written with numbers of their own."""
    cache = make_cache(layers=layers, num_pages=4, block_size=block_size, dtype=dtype)
    cache.pool.fill_(torch.nan)
    written: list[tuple[CachePart, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for number, part in enumerate(all_parts(cache)):
        group = cache.layout.groups[part.part.group]
        first = (3 - part.part.group) * group.blocks_per_page
        blocks = torch.arange(first, first + group.blocks_per_page).flip(0)
        slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
        shape = (len(slots), len(part.part.kv_heads), part.part.head_dim)
        key, value = (torch.randn(2, *shape) + number).to(dtype)
        part.write(key, value, slots)
        written.append((part, blocks, key, value))
    for part, blocks, key, value in written:
        read_key, read_value = part.gather(blocks[None])
        assert torch.equal(read_key[0].transpose(0, 1), key)
        assert torch.equal(read_value[0].transpose(0, 1), value)
    filled = int(cache.pool.isfinite().sum())
    pages = len(cache.layout.groups) * cache.layout.page_elements
    wasted = sum(cache.layout.page_elements % group.block_elements for group in cache.layout.groups)
    assert filled == pages - wasted, "every element of a page that is not left over is in use"


def test_gather_reads_a_rectangle_of_tables() -> None:
    (part,) = make_cache().layers[2]
    key, value = torch.randn(2, 24, 1, 2)
    part.write(key, value, torch.arange(24))
    table = torch.tensor([[3, 0], [5, 1], [2, 2]])
    read_key, read_value = part.gather(table)
    assert read_key.shape == read_value.shape == (3, 1, 8, 2)
    for row, blocks in enumerate(table.tolist()):
        slots = [4 * block + at for block in blocks for at in range(4)]
        assert torch.equal(read_key[row, 0], key[slots, 0])
        assert torch.equal(read_value[row, 0], value[slots, 0])


def test_places_say_where_a_block_lies() -> None:
    """In parts that share pages unevenly."""
    cache = make_cache(layers=WINDOWS)
    for part in all_parts(cache):
        offset, page, block, per_page, num_kv_heads, block_size = part.places
        key, value = torch.randn(2, block_size, num_kv_heads, part.part.head_dim)
        number = 2 * per_page - 1  # the last block of the second page
        part.write(key, value, torch.arange(number * block_size, (number + 1) * block_size))
        start = offset + number // per_page * page + number % per_page * block
        stored = cache.pool[start : start + 2 * key.numel()]
        both = stored.view(2, num_kv_heads, block_size, part.part.head_dim).transpose(1, 2)
        assert torch.equal(both, torch.stack((key, value)))


@pytest.mark.parametrize("layers", [MIXED, WINDOWS], ids=["mixed", "windows"])
def test_clearing_makes_a_slot_finite_and_no_other(layers: tuple[HeadConfig, ...]) -> None:
    cache = make_cache(layers=layers)
    for part in all_parts(cache):
        cache.pool.fill_(torch.nan)
        part.clear(torch.tensor([5, 9]))
        cleared = int(cache.pool.isfinite().sum())
        assert cleared == 2 * 2 * len(part.part.kv_heads) * part.part.head_dim
        key, value = part.gather(torch.tensor([[1, 2]]))
        assert key[0, 0].isfinite().all(dim=-1).nonzero().flatten().tolist() == [1, 5]
        assert value.isfinite().equal(key.isfinite())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_allocated_bytes_equal_the_formula(dtype: str) -> None:
    config = tiny.llama(layers=MIXED, dtype=dtype)
    cache = make_cache(num_pages=5, block_size=3, dtype=getattr(torch, dtype))
    assert cache.nbytes == 5 * 3 * config.kv_bytes_per_token()
    assert cache.block_size == 3
    windows = make_cache(layers=WINDOWS, num_pages=5, dtype=getattr(torch, dtype))
    assert windows.nbytes == 5 * windows.layout.page_elements * windows.pool.itemsize


def test_memory_starts_as_zeros() -> None:
    assert not make_cache().pool.any()


def test_a_cache_of_nothing_has_no_memory() -> None:
    assert make_cache(num_pages=0).nbytes == 0


def test_a_system_without_large_pages_gives_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class SmallPages(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", SmallPages)
    cache = make_cache()
    assert not cache.pool.any()
    cache.pool.fill_(1.0)
    assert cache.pool.all()


# Metadata


def test_metadata_describes_decodes_and_chunks() -> None:
    metadata = build(
        [[7, 2], [4], [9, 1, 3, 8], [5, 6]],
        [4, 0, 3, 0],
        [1, 1, 6, 2],
    )
    assert metadata.slot_mapping.tolist() == [
        2 * 4,  # position 4
        4 * 4,  # position 0
        *[9 * 4 + 3, 1 * 4, 1 * 4 + 1, 1 * 4 + 2, 1 * 4 + 3, 3 * 4],  # positions 3 to 8
        *[5 * 4, 5 * 4 + 1],  # positions 0 and 1
    ]
    assert metadata.slot_mapping.dtype == torch.int64
    decodes, chunk, whole = metadata.batches
    spans = [(batch.start, batch.end) for batch in metadata.batches]
    assert spans == [(0, 2), (2, 8), (8, 10)]
    assert decodes.block_tables.tolist() == [[7, 2], [4, 4]], "padded with its own block"
    assert decodes.query_positions.tolist() == [[4], [0]]
    assert decodes.key_positions.tolist() == [
        [0, 1, 2, 3, 4, -1, -1, -1],
        [0, -1, -1, -1, -1, -1, -1, -1],
    ]
    assert chunk.block_tables.tolist() == [[9, 1, 3]], "only the blocks in use"
    assert chunk.query_positions.tolist() == [[3, 4, 5, 6, 7, 8]]
    assert chunk.key_positions.tolist() == [[*range(9), -1, -1, -1]]
    assert whole.block_tables.tolist() == [[5]]
    assert [batch.whole_length for batch in metadata.batches] == [None, None, 2]


def test_blocks_that_were_given_back_are_not_read() -> None:
    metadata = build(
        [[RELEASED, RELEASED, 3, 8], [0, RELEASED, RELEASED, 5, 6], [1, RELEASED, 2]],
        [13, 17, 8],
        [1, 1, 3],
    )
    decodes, chunk = metadata.batches
    assert decodes.block_tables.tolist() == [[3, 8, 8], [0, 5, 6]]
    assert decodes.key_positions.tolist() == [
        [8, 9, 10, 11, 12, 13, -1, -1, -1, -1, -1, -1],
        [0, 1, 2, 3, 12, 13, 14, 15, 16, 17, -1, -1],
    ]
    assert chunk.block_tables.tolist() == [[1, 2]]
    assert chunk.key_positions.tolist() == [[0, 1, 2, 3, 8, 9, 10, -1]]
    assert metadata.slot_mapping.tolist() == [8 * 4 + 1, 6 * 4 + 1, 2 * 4, 2 * 4 + 1, 2 * 4 + 2]


def test_all_rows_are_told_as_they_are() -> None:
    metadata = build([[7, 2], [RELEASED, 4, 5], [9]], [4, 9, 0], [1, 2, 3])
    tables = metadata.block_tables
    assert tables.block_tables.tolist() == [
        [7, 2, RELEASED],
        [RELEASED, 4, 5],
        [9, RELEASED, RELEASED],
    ]
    assert tables.query_start.tolist() == [0, 1, 3, 6]
    assert tables.num_computed.tolist() == [4, 9, 0]
    for each in (tables.block_tables, tables.query_start, tables.num_computed):
        assert each.dtype == torch.int32
        assert each.is_contiguous()


def test_each_form_is_made_once() -> None:
    """All layers of a group read the same."""
    metadata = build([[0, 1, 2]], [9], [1])
    assert metadata.block_tables is metadata.block_tables
    assert metadata.batches is metadata.batches
    assert metadata.slot_mapping is metadata.slot_mapping


def test_groups_have_blocks_of_their_own() -> None:
    metadata = AttentionMetadata.build(
        block_tables=[[[1, 2], [RELEASED, 9]], [[4], [0]]],
        num_computed_tokens=[5, 2],
        num_new_tokens=[1, 1],
        block_size=4,
        device=CPU,
    )
    first, second = metadata.groups
    assert first.slot_mapping.tolist() == [9, 18]
    assert second.slot_mapping.tolist() == [37, 2]
    assert first.batches[0].block_tables.tolist() == [[1, 2], [4, 4]]
    assert second.batches[0].block_tables.tolist() == [[9], [0]]
    assert second.batches[0].key_positions.tolist() == [[4, 5, -1, -1], [0, 1, 2, -1]]


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    tokens_per_gather=st.integers(1, 120),
)
def test_decodes_are_cut_into_neighbours_that_gather_few_tokens(
    lengths: list[int], tokens_per_gather: int
) -> None:
    block_size = 4
    metadata = AttentionMetadata.build(
        block_tables=[[list(range(-(-length // block_size)))] for length in [*lengths, 6]],
        num_computed_tokens=[*(length - 1 for length in lengths), 4],
        num_new_tokens=[*(1 for _ in lengths), 2],
        block_size=block_size,
        device=CPU,
        tokens_per_gather=[tokens_per_gather],
    )
    *decodes, chunk = metadata.groups[0].batches
    assert (chunk.start, chunk.end) == (len(lengths), len(lengths) + 2)
    at = 0
    for index, batch in enumerate(decodes):
        assert batch.start == at
        own = lengths[at : batch.end]
        rows, width = batch.block_tables.shape
        assert (rows, width) == (len(own), -(-max(own) // block_size))
        assert rows == 1 or rows * width * block_size <= tokens_per_gather
        if index + 1 < len(decodes):  # it could not have taken its neighbour too
            wider = -(-max(*own, lengths[batch.end]) // block_size)
            assert (rows + 1) * wider * block_size > tokens_per_gather // block_size * block_size
        at = batch.end
    assert at == len(lengths)


def test_a_gather_of_decodes_takes_a_few_mebibytes_of_the_widest_layer() -> None:
    layers = (HeadConfig(4, 4, 8), HeadConfig(4, 2, 8), HeadConfig(4, 1, 16, window=8))
    cache = make_cache(layers=layers, dtype=torch.bfloat16)
    assert cache.tokens_per_gather == (2**23 // (2 * 4 * 8 * 2), 2**23 // (2 * 1 * 16 * 2))


def test_what_was_gathered_is_overwritten_by_the_next_gather() -> None:
    cache = make_cache(layers=(HeadConfig(2, 1, 4),) * 2)
    cache.pool.normal_(generator=torch.Generator().manual_seed(0))
    (first,), (second,) = cache.layers
    key, _ = first.gather(torch.tensor([[0, 1]]))
    other, _ = second.gather(torch.tensor([[0, 1]]))
    assert key.data_ptr() == other.data_ptr()


def test_decode_tables_are_as_wide_as_the_longest_sequence_and_no_wider() -> None:
    (decodes,) = build([[1, 2, 3, 4], [5]], [7, 2], [1, 1]).batches
    assert decodes.block_tables.tolist() == [[1, 2], [5, 5]]
    assert (decodes.key_positions >= 0).sum(dim=-1).tolist() == [8, 3]


def test_a_batch_of_chunks_has_no_decodes() -> None:
    (chunk,) = build([[1]], [0], [3]).batches
    assert (chunk.start, chunk.end, chunk.whole_length) == (0, 3, 3)


def test_decodes_come_before_chunks() -> None:
    with pytest.raises(AssertionError, match="decodes come first"):
        build([[1], [2]], [0, 0], [3, 1])


def test_rows_of_a_step_are_unpacked_by_sequence() -> None:
    metadata = build([[0], [1], [2]], [2, 3, 0], [1, 1, 3])
    packed = torch.arange(5 * 2 * 3).view(5, 2, 3)
    decodes, chunk = metadata.batches
    assert torch.equal(decodes.unpack(packed), packed[:2, :, None])
    assert torch.equal(chunk.unpack(packed), packed[2:].transpose(0, 1)[None])


def test_a_mask_is_computed_once_for_equal_settings_and_never_mixed_up() -> None:
    (decodes,) = build([[0, 1, 2]], [9], [1]).batches
    plain, window = decodes.mask(Scoring(0.5)), decodes.mask(Scoring(0.5, window=3))
    assert decodes.mask(Scoring(0.9))[0] is plain[0], "the scale alone makes no other mask"
    assert plain[0].sum() == 10
    assert window[0].sum() == 3
    assert decodes.mask(Scoring(0.5, window=3, sink_tokens=2))[0].sum() == 5
    assert decodes.mask(Scoring(0.5, window=(3, None)))[0].sum() == 13
