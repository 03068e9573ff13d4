"""Masks are the ones of transformers, or of loops over their definition."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import masking_utils

from models import masks
from models.errors import ConfigError, MaskError, ModelError
from models.kernels import dense, reference
from models.scoring import Scoring

LENGTHS = st.integers(1, 9).flatmap(lambda keys: st.tuples(st.integers(1, keys), st.just(keys)))


def theirs(
    num_queries: int,
    num_keys: int,
    mask_function: Callable[..., Tensor],
    *,
    batch: int = 1,
    padding: Tensor | None = None,
) -> Tensor:
    mask: Tensor = masking_utils.sdpa_mask(
        batch_size=batch,
        q_length=num_queries,
        kv_length=num_keys,
        q_offset=num_keys - num_queries,
        mask_function=mask_function,
        attention_mask=padding,
        allow_is_causal_skip=False,
    )
    return mask


@given(lengths=LENGTHS)
def test_causal(lengths: tuple[int, int]) -> None:
    expected = theirs(*lengths, masking_utils.causal_mask_function)
    assert torch.equal(masks.causal(*lengths), expected)


def test_causal_behind_a_prefix_is_the_last_rows_of_the_whole() -> None:
    assert torch.equal(masks.causal(3, 8), masks.causal(8, 8)[:, :, -3:])


@given(lengths=LENGTHS, window=st.integers(1, 11))
def test_sliding_window(lengths: tuple[int, int], window: int) -> None:
    both = masks.causal(*lengths) & masks.sliding_window(*lengths, window)
    expected = theirs(*lengths, masking_utils.sliding_window_causal_mask_function(window))
    assert torch.equal(both, expected)
    # Their bidirectional window counts the distance, ours the keys.
    wide = masking_utils.sliding_window_bidirectional_mask_function(window - 1)
    assert torch.equal(masks.sliding_window(*lengths, window), theirs(*lengths, wide))


@given(
    lengths=LENGTHS,
    windows=st.lists(st.none() | st.integers(1, 11), min_size=1, max_size=4),
    sink_tokens=st.integers(0, 3),
)
def test_a_window_for_each_head_and_sink_tokens(
    lengths: tuple[int, int], windows: list[int | None], sink_tokens: int
) -> None:
    num_queries, num_keys = lengths
    mask = masks.sliding_window(*lengths, windows, sink_tokens=sink_tokens)
    assert mask.shape == (1, len(windows), *lengths)
    for head, window in enumerate(windows):
        for query in range(num_queries):
            for key in range(num_keys):
                distance = abs(query + num_keys - num_queries - key)
                near = window is None or distance < window
                assert mask[0, head, query, key] == (near or key < sink_tokens)


@given(lengths=LENGTHS, data=st.data())
def test_prefix_lm(lengths: tuple[int, int], data: st.DataObject) -> None:
    num_queries, num_keys = lengths
    prefixes = data.draw(st.lists(st.integers(0, num_keys), min_size=1, max_size=3))
    mask = masks.prefix_lm(*lengths, prefixes)
    assert mask.shape == (len(prefixes), 1, *lengths)
    for row, prefix in enumerate(prefixes):
        for query in range(num_queries):
            for key in range(num_keys):
                own = query + num_keys - num_queries
                assert mask[row, 0, query, key] == (key <= own or key < prefix)
        assert torch.equal(masks.prefix_lm(*lengths, prefix), mask[row : row + 1])


@given(lengths=LENGTHS, data=st.data())
def test_padding(lengths: tuple[int, int], data: st.DataObject) -> None:
    num_keys = lengths[1]
    real = data.draw(st.lists(st.integers(0, num_keys), min_size=1, max_size=4))
    rows = torch.tensor([[key < length for key in range(num_keys)] for length in real])
    expected = theirs(*lengths, masking_utils.causal_mask_function, batch=len(real), padding=rows)
    assert torch.equal(masks.causal(*lengths) & masks.padding(real, num_keys), expected)


@given(sizes=st.lists(st.lists(st.integers(1, 4), min_size=3, max_size=3), min_size=1, max_size=3))
def test_packed_documents(sizes: list[list[int]]) -> None:
    longest = max(map(sum, sizes))
    rows = [[*row, longest - sum(row)] for row in sizes]  # the rest is one more document
    ids = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in rows])
    positions = torch.tensor([[at for n in row for at in range(n)] for row in rows])
    found = masking_utils.find_packed_sequence_indices(positions)
    packed = masking_utils.packed_sequence_mask_function(found)
    both = masking_utils.and_masks(masking_utils.causal_mask_function, packed)
    expected = theirs(longest, longest, both, batch=len(rows))
    assert torch.equal(masks.causal(longest, longest) & masks.documents(ids), expected)


def test_masks_of_all_kinds_combine_and_both_kernels_take_them() -> None:
    mask = (
        masks.causal(4, 6)
        & masks.sliding_window(4, 6, [2, None, 3, 6])
        & masks.padding([6, 4], 6)
        & masks.documents(torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 3, 3]]))[:, :, -4:]
    )
    assert mask.shape == (2, 4, 4, 6)
    query, key, value = (torch.randn(2, heads, n, 8) for heads, n in ((4, 4), (2, 6), (2, 6)))
    attended = reference.attend(query, key, value, Scoring(0.3), visible=mask)
    assert (attended.weights[~mask] == 0).all()
    assert (attended.weights[mask] > 0).all()
    fused = dense.attend(query, key, value, Scoring(0.3), visible=mask)
    assert (fused - attended.output).abs().max() <= 2e-6


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: masks.causal(5, 4), ConfigError, "num_queries is 5; allowed: 1 to num_keys=4"),
        (lambda: masks.causal(0, 4), ConfigError, "num_queries is 0; allowed: 1 to num_keys=4"),
        (
            lambda: masks.sliding_window(4, 4, 0),
            ConfigError,
            "window is 0; allowed: 1 (a query sees its own key) or more; "
            "you probably meant None, which sees all keys",
        ),
        (lambda: masks.sliding_window(4, 4, [2, -1]), ConfigError, "window is -1; allowed: 1 ("),
        (
            lambda: masks.sliding_window(4, 4, 2, sink_tokens=-1),
            ConfigError,
            "sink_tokens is -1; allowed: 0 or more",
        ),
        (
            lambda: masks.prefix_lm(4, 4, [2, 5]),
            ConfigError,
            "prefix_lengths[1] is 5; allowed: 0 to num_keys=4",
        ),
        (
            lambda: masks.padding([-1], 4),
            ConfigError,
            "lengths[0] is -1; allowed: 0 to num_keys=4",
        ),
        (
            lambda: masks.documents(torch.tensor([0, 0, 1])),
            MaskError,
            "segment_ids has shape [3] of torch.int64; allowed: integers [batch, tokens]; "
            "you probably meant segment_ids[None]",
        ),
        (
            lambda: masks.documents(torch.zeros(1, 3)),
            MaskError,
            "segment_ids has shape [1, 3] of torch.float32",
        ),
    ],
)
def test_what_no_mask_can_be_is_refused(
    build: Callable[[], Tensor], error: type[ModelError], message: str
) -> None:
    with pytest.raises(error) as caught:
        build()
    assert str(caught.value).startswith(message)
