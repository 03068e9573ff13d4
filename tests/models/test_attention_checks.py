"""Every classic mistake has its message, and the correct call next to it passes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from models import masks
from models.attention_checks import check_attention_inputs, check_scale
from models.config import HeadConfig
from models.errors import ConfigError, InputError, MaskError, ModelError, ShapeError
from models.multihead import MultiheadAttention
from models.positions import RopeConfig


@dataclass(frozen=True)
class Mistake:
    """What fails with exactly this message, and what was meant by it."""

    wrong: Callable[[], object]
    error: type[ModelError]
    message: str
    right: Callable[[], object]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def with_number(number: float, *shape: int) -> Tensor:
    tensor = randn(*shape)
    tensor[(1, *[2] * (len(shape) - 1))] = number
    return tensor


# [batch, heads, tokens, head_dim]: 2 entries, 4 heads that share 2, 5 queries, 7 keys.
Q, K, V = randn(2, 4, 5, 8), randn(2, 2, 7, 8), randn(2, 2, 7, 6)
CAUSAL = masks.causal(5, 7)
DECLARED = "[batch, heads, tokens, head_dim]"
MASK_SHAPE = "[batch=2 or 1, heads=4 or 1, queries=5 or 1, keys=7]"


def check(
    query: Tensor = Q,
    key: Tensor = K,
    value: Tensor = V,
    mask: Tensor | None = None,
    window: int | tuple[int | None, ...] | None = None,
) -> None:
    check_attention_inputs(query, key, value, mask=mask, window=window)


TENSORS = {
    "batch and heads confused": Mistake(
        lambda: check(Q.transpose(0, 1)),
        ShapeError,
        f"key has shape [2, 2, 7, 8]; allowed: batch 4, as the query has, in {DECLARED}; "
        "you probably meant query.permute(1, 0, 2, 3), from [heads, batch, tokens, head_dim]",
        lambda: check(Q.transpose(0, 1).permute(1, 0, 2, 3)),
    ),
    "tokens before heads": Mistake(
        lambda: check(Q, K.transpose(1, 2), V.transpose(1, 2)),
        ShapeError,
        "key has shape [2, 7, 2, 8]; allowed: a number of kv_heads that divides the query's "
        f"4 heads in {DECLARED}; you probably meant key.permute(0, 2, 1, 3) and "
        "value.permute(0, 2, 1, 3), from [batch, tokens, heads, head_dim]",
        check,
    ),
    "tokens first": Mistake(
        lambda: check(Q, K.permute(2, 0, 1, 3), V.permute(2, 0, 1, 3)),
        ShapeError,
        f"key has shape [7, 2, 2, 8]; allowed: batch 2, as the query has, in {DECLARED}; you "
        "probably meant key.permute(1, 2, 0, 3) and value.permute(1, 2, 0, 3), "
        "from [tokens, batch, heads, head_dim]",
        check,
    ),
    "a key that is already transposed": Mistake(
        lambda: check(Q, K.transpose(2, 3)),
        ShapeError,
        f"key has shape [2, 2, 8, 7]; allowed: head_dim 8, as the query has, in {DECLARED}; "
        "you probably meant key.permute(0, 1, 3, 2), from [batch, heads, head_dim, tokens]",
        check,
    ),
    "key and value of different length": Mistake(
        lambda: check(Q, K, V[:, :, :6]),
        ShapeError,
        f"value has shape [2, 2, 6, 6]; allowed: 7 tokens, as the key has, in {DECLARED}",
        check,
    ),
    "key and value of different heads": Mistake(
        lambda: check(Q, K, V[:, :1]),
        ShapeError,
        f"value has shape [2, 1, 7, 6]; allowed: 2 kv_heads, as the key has, in {DECLARED}",
        lambda: check(Q, K[:, :1], V[:, :1]),
    ),
    "heads that cannot be shared": Mistake(
        lambda: check(Q, randn(2, 3, 7, 8), randn(2, 3, 7, 6)),
        ShapeError,
        "key has shape [2, 3, 7, 8]; allowed: a number of kv_heads that divides the query's "
        f"4 heads in {DECLARED}",
        check,
    ),
    "no batch": Mistake(
        lambda: check(Q[0], K[0], V[0]),
        ShapeError,
        f"query has shape [4, 5, 8]; allowed: 4 axes, {DECLARED}; "
        "you probably meant query[None], a batch of one",
        lambda: check(Q[:1], K[:1], V[:1]),
    ),
    "no keys": Mistake(
        lambda: check(Q, K[:, :, :0], V[:, :, :0]),
        ShapeError,
        "key has shape [2, 2, 0, 8] with no tokens; allowed: 1 or more of each",
        lambda: check(Q, K[:, :, :1], V[:, :, :1]),
    ),
    "not a number": Mistake(
        lambda: check(Q, with_number(math.nan, 2, 3, 7, 8)[:, 1:]),
        InputError,
        "key is nan at [1, 1, 2, 2]; allowed: finite numbers",
        check,
    ),
    "infinite": Mistake(
        lambda: check(Q, K, with_number(-math.inf, 2, 3, 7, 6)[:, 1:]),
        InputError,
        "value is -inf at [1, 1, 2, 2]; allowed: finite numbers",
        lambda: check(Q, K, with_number(-1e38, 2, 3, 7, 6)[:, 1:]),
    ),
    "data types mixed": Mistake(
        lambda: check(Q, K.double()),
        InputError,
        "key is of torch.float64; allowed: torch.float32, as query is",
        lambda: check(Q.double(), K.double(), V.double()),
    ),
    "integers": Mistake(
        lambda: check(Q.int(), K.int(), V.int()),
        InputError,
        "query is of torch.int32; allowed: a floating type",
        lambda: check(Q.bfloat16(), K.bfloat16(), V.bfloat16()),
    ),
    "a window of nothing": Mistake(
        lambda: check(window=0),
        ConfigError,
        "window is 0; allowed: 1 (a query sees its own key) or more; "
        "you probably meant None, which sees all keys",
        lambda: check(window=1),
    ),
    "a window of -1 for one head": Mistake(
        lambda: check(window=(4, 4, -1, 4)),
        ConfigError,
        "window is -1; allowed: 1 (a query sees its own key) or more; "
        "you probably meant None, which sees all keys",
        lambda: check(window=(4, 4, None, 4)),
    ),
    "a window for each key/value head": Mistake(
        lambda: check(window=(4, 4)),
        ConfigError,
        "window is '2 windows'; allowed: one for each of 4 heads",
        lambda: check(window=(4, 4, 4, 4)),
    ),
}

MASKS = {
    "inverted causal": Mistake(
        lambda: check(mask=~CAUSAL),
        MaskError,
        "mask lets every query see exactly the keys after it; allowed: True means visible here; "
        "you probably meant ~mask, the causal mask",
        lambda: check(mask=CAUSAL),
    ),
    "inverted causal, aligned as torch's is_causal": Mistake(
        lambda: check(mask=torch.ones(1, 1, 5, 7).triu(1).bool().expand(2, 4, -1, -1)),
        MaskError,
        "mask lets every query see exactly the keys after it; allowed: True means visible here; "
        "you probably meant ~mask, the causal mask",
        lambda: check(mask=torch.ones(1, 1, 5, 7).tril().bool()),
    ),
    "inverted mask that hides nothing": Mistake(
        lambda: check(mask=torch.zeros(2, 1, 1, 7).bool()),
        MaskError,
        "mask is False everywhere, so that no query sees any key; allowed: True means visible "
        "here; you probably meant ~mask",
        lambda: check(mask=masks.padding([7, 0], 7)),
    ),
    "-inf everywhere": Mistake(
        lambda: check(mask=torch.full((1, 1, 5, 7), -math.inf)),
        MaskError,
        "mask is -inf everywhere; allowed: a mask with which some key is seen",
        lambda: check(mask=torch.zeros(1, 1, 5, 7).masked_fill(~CAUSAL, -math.inf)),
    ),
    "integers 0 and 1": Mistake(
        lambda: check(mask=CAUSAL.long()),
        MaskError,
        "mask is of torch.int64; allowed: torch.bool, or a floating type; "
        "you probably meant mask.bool()",
        lambda: check(mask=CAUSAL.long().bool()),
    ),
    "other integers": Mistake(
        lambda: check(mask=CAUSAL.long() - 1),
        MaskError,
        "mask is of torch.int64; allowed: torch.bool, or a floating type",
        lambda: check(mask=(CAUSAL.float() - 1)),
    ),
    "floats 0 and 1": Mistake(
        lambda: check(mask=CAUSAL.float()),
        MaskError,
        "mask holds only the numbers 0 and 1, which would be added to the scores; allowed: "
        "biases such as 0 and -inf, or torch.bool; you probably meant mask.bool()",
        lambda: check(mask=2 * CAUSAL.float()),
    ),
    "not a number": Mistake(
        lambda: check(mask=torch.zeros(1, 1, 5, 7).log().sqrt()),
        MaskError,
        "mask is nan at [0, 0, 0, 0]; allowed: finite numbers and -inf",
        lambda: check(mask=torch.zeros(1, 1, 5, 7)),
    ),
    "two axes": Mistake(
        lambda: check(mask=CAUSAL[0, 0]),
        MaskError,
        f"mask has shape [5, 7]; allowed: {MASK_SHAPE}; you probably meant mask[None, None]",
        lambda: check(mask=CAUSAL[0, 0][None, None]),
    ),
    "padding": Mistake(
        lambda: check(mask=masks.padding([7, 3], 7)[:, 0, 0]),
        MaskError,
        f"mask has shape [2, 7]; allowed: {MASK_SHAPE}; "
        "you probably meant mask[:, None, None], one row of keys for each batch entry",
        lambda: check(mask=masks.padding([7, 3], 7)),
    ),
    "one for each batch entry": Mistake(
        lambda: check(mask=CAUSAL[0].expand(2, -1, -1)),
        MaskError,
        f"mask has shape [2, 5, 7]; allowed: {MASK_SHAPE}; "
        "you probably meant mask[:, None], one mask for each batch entry",
        lambda: check(mask=CAUSAL.expand(2, -1, -1, -1)),
    ),
    "one for each head": Mistake(
        lambda: check(mask=CAUSAL[0].expand(4, -1, -1)),
        MaskError,
        f"mask has shape [4, 5, 7]; allowed: {MASK_SHAPE}; "
        "you probably meant mask[None], one mask for each head",
        lambda: check(mask=CAUSAL.expand(-1, 4, -1, -1)),
    ),
    "keys before queries": Mistake(
        lambda: check(mask=CAUSAL.transpose(2, 3)),
        MaskError,
        f"mask has shape [1, 1, 7, 5]; allowed: {MASK_SHAPE}; "
        "you probably meant mask.transpose(-1, -2), queries before keys",
        lambda: check(mask=CAUSAL),
    ),
    "one column for all keys": Mistake(
        lambda: check(mask=torch.ones(2, 1, 5, 1).bool()),
        MaskError,
        f"mask has shape [2, 1, 5, 1]; allowed: {MASK_SHAPE}",
        lambda: check(mask=torch.ones(2, 1, 1, 7).bool()),
    ),
}

NUMBERS = {
    "heads that do not divide": Mistake(
        lambda: MultiheadAttention(10, 4),
        ConfigError,
        "embed_dim is 10; allowed: a multiple of num_heads=4; you probably meant num_heads=5",
        lambda: MultiheadAttention(10, 5),
    ),
    "heads and width exchanged": Mistake(
        lambda: MultiheadAttention(8, 64),
        ConfigError,
        "embed_dim is 8; allowed: a multiple of num_heads=64; "
        "you probably meant embed_dim=64, num_heads=8",
        lambda: MultiheadAttention(64, 8),
    ),
    "no heads": Mistake(
        lambda: MultiheadAttention(8, 0),
        ConfigError,
        "num_heads is 0; allowed: 1 or more",
        lambda: MultiheadAttention(8, 1),
    ),
    "no keys": Mistake(
        lambda: MultiheadAttention(8, 2, kdim=0),
        ConfigError,
        "kdim is 0; allowed: 1 or more",
        lambda: MultiheadAttention(8, 2, kdim=1),
    ),
    "key/value heads that do not divide": Mistake(
        lambda: HeadConfig(6, 4, 8),
        ConfigError,
        "num_kv_heads is 4; allowed: a divisor of num_heads=6",
        lambda: HeadConfig(6, 3, 8),
    ),
    "odd rotary width": Mistake(
        lambda: RopeConfig(10_000.0, rotary_dim=7),
        ConfigError,
        "rotary_dim is 7; allowed: an even number, 2 or more",
        lambda: RopeConfig(10_000.0, rotary_dim=6),
    ),
    "dropout in per cent": Mistake(
        lambda: MultiheadAttention(8, 2, dropout=10),
        ConfigError,
        "dropout is 10; allowed: 0 or more, less than 1; you probably meant 0.1",
        lambda: MultiheadAttention(8, 2, dropout=0.1),
    ),
    "dropout of everything": Mistake(
        lambda: MultiheadAttention(8, 2, dropout=1.0),
        ConfigError,
        "dropout is 1.0; allowed: 0 or more, less than 1",
        lambda: MultiheadAttention(8, 2, dropout=0.99),
    ),
    "a layout that is no layout": Mistake(
        lambda: MultiheadAttention(8, 2, batch_first="BTE"),  # type: ignore[arg-type]
        ConfigError,
        "batch_first is 'BTE'; allowed: True for [batch, tokens, width], "
        "False for [tokens, batch, width]",
        lambda: MultiheadAttention(8, 2, batch_first=True),
    ),
    "an implementation that is none": Mistake(
        lambda: MultiheadAttention(8, 2, implementation="flash"),  # type: ignore[arg-type]
        ConfigError,
        "implementation is 'flash'; allowed: fused or split",
        lambda: MultiheadAttention(8, 2, implementation="split"),
    ),
    "scale is the square root": Mistake(
        lambda: check_scale(8.0, 64),
        ConfigError,
        "scale is 8.0; allowed: a finite number above 0, by which scores are multiplied; "
        "you probably meant 0.125, head_dim ** -0.5",
        lambda: check_scale(0.125, 64),
    ),
    "scale is the width": Mistake(
        lambda: check_scale(64, 64),
        ConfigError,
        "scale is 64; allowed: a finite number above 0, by which scores are multiplied; "
        "you probably meant 0.125, head_dim ** -0.5",
        lambda: check_scale(1 / 64, 64),
    ),
    "scale is 0": Mistake(
        lambda: check_scale(0.0, 64),
        ConfigError,
        "scale is 0.0; allowed: a finite number above 0, by which scores are multiplied",
        lambda: check_scale(1.0, 1),
    ),
}


# Sequences: 2 entries, 5 queries, 7 keys, width 8.
X, Y = randn(2, 5, 8), randn(2, 7, 8)
BTE = "[batch, tokens, width] (batch_first=True)"
TBE = "[tokens, batch, width] (batch_first=False)"


def mha(
    query: Tensor = X,
    key: Tensor = Y,
    value: Tensor | None = None,
    *,
    batch_first: bool = True,
    attn_mask: Tensor | None = None,
    padding: Tensor | None = None,
    is_causal: bool = False,
) -> None:
    MultiheadAttention(8, 4, batch_first=batch_first)(
        query,
        key,
        key if value is None else value,
        key_padding_mask=padding,
        attn_mask=attn_mask,
        is_causal=is_causal,
    )


HIDDEN = ~CAUSAL[0, 0]
MHA_MASK_SHAPE = "[queries=5, keys=7] or [batch*heads=8, queries=5, keys=7]"

MULTIHEAD = {
    "tokens first where the batch is declared": Mistake(
        lambda: mha(X.transpose(0, 1), Y.transpose(0, 1)),
        ShapeError,
        f"key has shape [7, 2, 8]; allowed: batch 5, as the query has, in {BTE}; "
        "you probably meant batch_first=False",
        lambda: mha(X.transpose(0, 1), Y.transpose(0, 1), batch_first=False),
    ),
    "batch first where tokens are declared": Mistake(
        lambda: mha(batch_first=False),
        ShapeError,
        f"key has shape [2, 7, 8]; allowed: batch 5, as the query has, in {TBE}; "
        "you probably meant batch_first=True",
        mha,
    ),
    "only key and value turned": Mistake(
        lambda: mha(X, Y.transpose(0, 1)),
        ShapeError,
        f"key has shape [7, 2, 8]; allowed: batch 2, as the query has, in {BTE}; "
        "you probably meant key.transpose(0, 1) and value.transpose(0, 1)",
        mha,
    ),
    "key and value of different length": Mistake(
        lambda: mha(X, Y, Y[:, :6]),
        ShapeError,
        f"value has shape [2, 6, 8]; allowed: 7 tokens, as the key has, in {BTE}",
        mha,
    ),
    "unbatched key and value of different length": Mistake(
        lambda: mha(X[0], Y[0], Y[0, :6]),
        ShapeError,
        "value has shape [6, 8]; allowed: 7 tokens, as the key has",
        lambda: mha(X[0], Y[0]),
    ),
    "another width": Mistake(
        lambda: mha(X, randn(2, 7, 9)),
        ShapeError,
        "key has shape [2, 7, 9]; allowed: a width of 8 in the last axis",
        mha,
    ),
    "width before tokens": Mistake(
        lambda: mha(X.transpose(1, 2)),
        ShapeError,
        "query has shape [2, 8, 5]; allowed: a width of 8 in the last axis; "
        "you probably meant query.transpose(-1, -2)",
        mha,
    ),
    "heads already apart": Mistake(
        lambda: mha(X.unflatten(2, (2, 4))),
        ShapeError,
        "query has shape [2, 5, 2, 4]; allowed: [batch, tokens, width], or [tokens, width] for "
        "all three; you probably meant query.flatten(2), heads side by side",
        mha,
    ),
    "batched and unbatched": Mistake(
        lambda: mha(X, Y[0]),
        ShapeError,
        "key has shape [7, 8]; allowed: [batch, tokens, width], or [tokens, width] for all three",
        lambda: mha(X[0], Y[0]),
    ),
    "no tokens": Mistake(
        lambda: mha(X[:, :0]),
        ShapeError,
        "query has shape [2, 0, 8]; allowed: 1 or more of each axis",
        lambda: mha(X[:, :1]),
    ),
    "not a number": Mistake(
        lambda: mha(with_number(math.nan, 2, 5, 8)),
        InputError,
        "query is nan at [1, 2, 2]; allowed: finite numbers",
        mha,
    ),
    "data type of the weights": Mistake(
        lambda: mha(X.double(), Y.double()),
        InputError,
        "query is of torch.float64; allowed: torch.float32, as out_proj.weight is",
        mha,
    ),
    "mask of the other polarity": Mistake(
        lambda: mha(attn_mask=~HIDDEN),
        MaskError,
        "attn_mask lets every query see exactly the keys after it; allowed: True means may not "
        "attend here; you probably meant ~attn_mask, the causal mask",
        lambda: mha(attn_mask=HIDDEN),
    ),
    "padding of the other polarity": Mistake(
        lambda: mha(padding=torch.ones(2, 7).bool()),
        MaskError,
        "key_padding_mask is True everywhere, so that no query sees any key; allowed: True means "
        "may not attend here; you probably meant ~key_padding_mask",
        lambda: mha(padding=torch.zeros(2, 7).bool()),
    ),
    "integer padding": Mistake(
        lambda: mha(padding=torch.tensor([[0] * 7, [0] * 5 + [1] * 2])),
        MaskError,
        "key_padding_mask is of torch.int64; allowed: torch.bool, or a floating type; "
        "you probably meant key_padding_mask.bool()",
        lambda: mha(padding=torch.tensor([[0] * 7, [0] * 5 + [1] * 2]).bool()),
    ),
    "padding turned": Mistake(
        lambda: mha(padding=torch.zeros(7, 2).bool()),
        MaskError,
        "key_padding_mask has shape [7, 2]; allowed: [batch=2, keys=7]; "
        "you probably meant key_padding_mask.T, batch before keys",
        lambda: mha(padding=torch.zeros(2, 7).bool()),
    ),
    "padding of a batch for none": Mistake(
        lambda: mha(X[0], Y[0], padding=torch.zeros(1, 7).bool()),
        MaskError,
        "key_padding_mask has shape [1, 7]; allowed: [keys=7]",
        lambda: mha(X[0], Y[0], padding=torch.zeros(7).bool()),
    ),
    "one mask for each batch entry": Mistake(
        lambda: mha(attn_mask=HIDDEN.expand(2, -1, -1)),
        MaskError,
        f"attn_mask has shape [2, 5, 7]; allowed: {MHA_MASK_SHAPE}; "
        "you probably meant attn_mask.repeat_interleave(num_heads, dim=0)",
        lambda: mha(attn_mask=HIDDEN.expand(2, -1, -1).repeat_interleave(4, dim=0)),
    ),
    "one mask for each head": Mistake(
        lambda: mha(attn_mask=HIDDEN.expand(4, -1, -1)),
        MaskError,
        f"attn_mask has shape [4, 5, 7]; allowed: {MHA_MASK_SHAPE}; "
        "you probably meant attn_mask.repeat(batch, 1, 1)",
        lambda: mha(attn_mask=HIDDEN.expand(4, -1, -1).repeat(2, 1, 1)),
    ),
    "four axes": Mistake(
        lambda: mha(attn_mask=HIDDEN.expand(2, 4, -1, -1)),
        MaskError,
        f"attn_mask has shape [2, 4, 5, 7]; allowed: {MHA_MASK_SHAPE}; "
        "you probably meant attn_mask.flatten(0, 1)",
        lambda: mha(attn_mask=HIDDEN.expand(2, 4, -1, -1).flatten(0, 1)),
    ),
    "keys before queries": Mistake(
        lambda: mha(attn_mask=HIDDEN.T),
        MaskError,
        f"attn_mask has shape [7, 5]; allowed: {MHA_MASK_SHAPE}; "
        "you probably meant attn_mask.T, queries before keys",
        lambda: mha(attn_mask=HIDDEN),
    ),
    "padding as attention mask": Mistake(
        lambda: mha(attn_mask=torch.zeros(2, 7).bool()),
        MaskError,
        f"attn_mask has shape [2, 7]; allowed: {MHA_MASK_SHAPE}; "
        "you probably meant key_padding_mask=attn_mask",
        lambda: mha(padding=torch.zeros(2, 7).bool()),
    ),
    "self-attention of tokens first, which only the mask tells": Mistake(
        lambda: mha(X.transpose(0, 1), X.transpose(0, 1), attn_mask=~masks.causal(5, 5)[0, 0]),
        MaskError,
        "attn_mask has shape [5, 5]; allowed: [queries=2, keys=2] or "
        "[batch*heads=20, queries=2, keys=2]; you probably meant batch_first=False",
        lambda: mha(X, X, attn_mask=~masks.causal(5, 5)[0, 0]),
    ),
    "is_causal alone": Mistake(
        lambda: mha(is_causal=True),
        ConfigError,
        "is_causal is True; allowed: a hint about attn_mask, which is not given; "
        "you probably meant attn_mask=~masks.causal(5, 7)[0, 0]",
        lambda: mha(is_causal=True, attn_mask=~masks.causal(5, 7)[0, 0]),
    ),
    "is_causal of another mask": Mistake(
        lambda: mha(is_causal=True, attn_mask=torch.zeros(5, 7).bool()),
        MaskError,
        "attn_mask is not causal, although is_causal says so; allowed: True, or -inf, exactly at "
        "the keys after each query; you probably meant is_causal=False",
        lambda: mha(is_causal=True, attn_mask=torch.zeros(5, 7).masked_fill(HIDDEN, -math.inf)),
    ),
    "is_causal of a mask with biases": Mistake(
        lambda: mha(is_causal=True, attn_mask=torch.ones(5, 7).masked_fill(HIDDEN, -math.inf)),
        MaskError,
        "attn_mask is not causal, although is_causal says so; allowed: True, or -inf, exactly at "
        "the keys after each query; you probably meant is_causal=False",
        lambda: mha(attn_mask=torch.ones(5, 7).masked_fill(HIDDEN, -math.inf)),
    ),
}


def _parameters(*tables: dict[str, Mistake]) -> list[object]:
    return [pytest.param(mistake, id=name) for table in tables for name, mistake in table.items()]


@pytest.mark.parametrize("mistake", _parameters(TENSORS, MASKS, NUMBERS, MULTIHEAD))
def test_a_mistake_has_its_message_and_the_correct_call_passes(mistake: Mistake) -> None:
    with pytest.raises(mistake.error) as caught:
        mistake.wrong()
    assert type(caught.value) is mistake.error
    assert str(caught.value) == mistake.message
    mistake.right()


def test_errors_name_the_field_and_what_was_meant() -> None:
    with pytest.raises(MaskError) as caught:
        check(mask=CAUSAL.long())
    assert caught.value.field == "mask"
    assert caught.value.meant == "mask.bool()"


@pytest.mark.parametrize("polarity", [True, False])
def test_of_one_query_or_one_key_polarity_cannot_be_told(polarity: bool) -> None:
    row = torch.full((1, 1, 1, 7), polarity)
    row[..., 3] = not polarity
    check(Q[:, :, :1], mask=row)
    check(Q, K[:, :, :1], V[:, :, :1], mask=row[..., :5].transpose(2, 3))
