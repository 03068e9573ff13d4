"""How a pool is cut: everything has its own place, and no place is left over in vain."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import HeadConfig, ModelConfig, Retention
from models.kv_layout import KVLayout, query_heads
from service.engine.group_pool import BlockGroup
from tests.models import tiny

SIZES = st.none() | st.integers(1, 9)


@st.composite
def head_configs(draw: st.DrawFn) -> HeadConfig:
    num_kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    num_heads = num_kv_heads * group
    return HeadConfig(
        num_heads,
        num_kv_heads,
        draw(st.sampled_from([1, 3, 8, 24, 80])),
        window=draw(SIZES | st.lists(SIZES, min_size=num_heads, max_size=num_heads).map(tuple)),
        sink_tokens=draw(st.sampled_from([0, 0, 2])),
    )


MODELS = st.lists(head_configs(), min_size=1, max_size=4).map(
    lambda layers: tiny.gpt2(layers=tuple(layers))
)


def wasted(layout: KVLayout) -> int:
    """Elements at the end of a page that its blocks leave over, for the worst group."""
    return max(layout.page_elements % group.block_elements for group in layout.groups)


def layout_of(*layers: HeadConfig, block_size: int = 4) -> KVLayout:
    return KVLayout.of(tiny.gpt2(layers=layers), block_size)


@given(config=MODELS, block_size=st.integers(1, 16))
def test_every_head_has_its_own_place_and_all_places_fill_the_blocks(
    config: ModelConfig, block_size: int
) -> None:
    layout = KVLayout.of(config, block_size)
    taken: list[list[int]] = [[] for _ in layout.groups]
    for heads, parts in zip(config.layers, layout.parts, strict=True):
        assert sorted(head for part in parts for head in part.kv_heads) == list(
            range(heads.num_kv_heads)
        )
        for part in parts:
            assert part.head_dim == heads.head_dim
            size = 2 * len(part.kv_heads) * block_size * part.head_dim
            taken[part.group].extend(range(part.offset, part.offset + size))
    for group, elements in zip(layout.groups, taken, strict=True):
        assert sorted(elements) == list(range(group.block_elements)), "no gap and no overlap"
    per_token = config.replace(dtype="float32").kv_bytes_per_token() // 4
    assert sum(group.block_elements for group in layout.groups) == block_size * per_token


@given(config=MODELS, block_size=st.integers(1, 16))
def test_heads_are_grouped_by_what_they_have_to_remember(
    config: ModelConfig, block_size: int
) -> None:
    """A key/value head remembers as long as the longest window of its query heads."""
    layout = KVLayout.of(config, block_size)
    assert len({group.retention for group in layout.groups}) == len(layout.groups)
    for heads, parts in zip(config.layers, layout.parts, strict=True):
        for part in parts:
            retention = layout.groups[part.group].retention
            readers = query_heads(heads, part)
            assert len(readers) == len(part.kv_heads) * heads.num_queries_per_kv
            for head in part.kv_heads:
                own = [
                    heads.windows[reader]
                    for reader in range(heads.num_heads)
                    if reader // heads.num_queries_per_kv == head
                ]
                assert {reader // heads.num_queries_per_kv for reader in readers} >= {head}
                longest = None if None in own else max(window for window in own if window)
                sinks = 0 if longest is None else heads.sink_tokens
                assert retention == Retention(longest, sinks)


@given(config=MODELS, block_size=st.integers(1, 16))
def test_a_page_holds_whole_blocks_and_wastes_little(config: ModelConfig, block_size: int) -> None:
    layout = KVLayout.of(config, block_size)
    sizes = [group.block_elements for group in layout.groups]
    for group in layout.groups:
        used = group.blocks_per_page * group.block_elements
        assert 0 <= layout.page_elements - used < group.block_elements
        assert group.blocks_per_page >= 1
    assert layout.page_elements <= 64 * max(sizes), "a page is no hoard"
    if math.lcm(*sizes) <= 64 * max(sizes):
        assert wasted(layout) == 0
        assert layout.page_elements == math.lcm(*sizes), "and no larger than it must be"
    else:
        # Of 64 multiples of the largest block one leaves little over for all of the others.
        assert wasted(layout) / layout.page_elements <= 1 / 16


def test_one_kind_of_heads_is_one_group_whose_page_is_a_block() -> None:
    for window in (None, 7):
        layout = layout_of(HeadConfig(4, 2, 8, window=window), HeadConfig(6, 3, 24, window=window))
        (group,) = layout.groups
        assert group.blocks_per_page == 1
        assert layout.page_elements == group.block_elements == 2 * 4 * (2 * 8 + 3 * 24)
        assert wasted(layout) == 0


def test_windows_of_alternating_layers_are_two_groups_over_all_layers() -> None:
    """Three of four layers have windows, as in some published models: a page is one large block
    or three small ones."""
    window, everything = HeadConfig(4, 2, 8, window=5), HeadConfig(4, 2, 8)
    layout = layout_of(window, window, window, everything)
    assert [group.retention.window for group in layout.groups] == [5, None]
    assert [group.blocks_per_page for group in layout.groups] == [1, 3]
    assert [[part.group for part in parts] for parts in layout.parts] == [[0], [0], [0], [1]]
    assert [parts[0].offset for parts in layout.parts] == [0, 128, 256, 0]
    assert wasted(layout) == 0


def test_heads_of_one_layer_are_parted_by_their_windows() -> None:
    heads = HeadConfig(8, 4, 8, window=(3, 5, None, 2, 5, 1, 7, None), sink_tokens=1)
    (parts,) = layout_of(heads).parts
    assert [part.kv_heads for part in parts] == [(0, 2), (1, 3)]
    assert [query_heads(heads, part) for part in parts] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [group.retention for group in layout_of(heads).groups] == [
        Retention(5, 1),
        Retention(),
    ]


def test_sizes_without_a_common_page_waste_a_bounded_share() -> None:
    """Blocks of 101, 103 and 107 heads: their least common multiple would be a million heads."""
    layers = tuple(
        HeadConfig(num_heads, num_heads, 8, window=window)
        for num_heads, window in ((101, 3), (103, 4), (107, 5))
    )
    layout = layout_of(*layers)
    largest = max(group.block_elements for group in layout.groups)
    assert layout.page_elements <= 64 * largest
    assert 0 < wasted(layout) / layout.page_elements < 0.01


@pytest.mark.parametrize("length", [1, 4, 5, 16, 17, 40, 100])
@given(windows=st.lists(SIZES, min_size=4, max_size=4).map(tuple), sink_tokens=st.integers(0, 6))
def test_windows_of_heads_cost_what_their_heads_remember(
    length: int, windows: tuple[int | None, ...], sink_tokens: int
) -> None:
    """Elements of a decoding sequence: of each head the window and the sinks, or all tokens, up
    to what its first and last blocks have beside them."""
    size, width = 4, 2 * 8
    layout = layout_of(HeadConfig(4, 4, 8, window=windows, sink_tokens=sink_tokens))
    planned = sum(
        group.block_elements
        * BlockGroup(group.retention.window, group.retention.sink_tokens).blocks_at_once(
            size, length, 1
        )
        for group in layout.groups
    )
    needed = sum(
        length if window is None else min(length, sink_tokens + window) for window in windows
    )
    assert planned <= (needed + 4 * 3 * (size - 1)) * width
    assert (
        planned
        >= sum(length if window is None else min(length, window) for window in windows) * width
    )
