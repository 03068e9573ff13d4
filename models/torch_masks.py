"""The masks of torch.nn.MultiheadAttention: checked, and as `visible` and `bias` of `attend`.

In theirs a bool True means *may not attend*; floats are added to the scaled scores.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from models.errors import ConfigError, MaskError
from models.mask_checks import check_mask_values, check_polarity

# batch, heads, queries, keys
Shape: TypeAlias = tuple[int, int, int, int]


def attention(mask: Tensor, shape: Shape, *, batch_first: bool) -> Tensor:
    """`attn_mask` as `[batch or 1, heads or 1, queries, keys]`."""
    batch, heads, queries, keys = shape
    check_mask_values("attn_mask", mask)
    if mask.shape not in ((queries, keys), (batch * heads, queries, keys)):
        meant = {  # where sizes coincide, the last one counts: the likeliest
            (batch, batch): f"batch_first={not batch_first}",
            (batch, keys): "key_padding_mask=attn_mask",
            (keys, queries): "attn_mask.T, queries before keys",
            (1, 1, queries, keys): "attn_mask[0, 0]",
            (batch, heads, queries, keys): "attn_mask.flatten(0, 1)",
            (heads, queries, keys): "attn_mask.repeat(batch, 1, 1)",
            (batch, queries, keys): "attn_mask.repeat_interleave(num_heads, dim=0)",
        }.get(tuple(mask.shape))
        raise MaskError(
            "attn_mask",
            f"has shape {list(mask.shape)}",
            f"[queries={queries}, keys={keys}] or "
            f"[batch*heads={batch * heads}, queries={queries}, keys={keys}]",
            meant,
        )
    mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, heads))
    check_polarity("attn_mask", mask, true_means="hidden")
    return mask


def padding(mask: Tensor, shape: Shape, *, batched: bool) -> Tensor:
    """`key_padding_mask` as `[batch, 1, 1, keys]`."""
    batch, keys = shape[0], shape[3]
    check_mask_values("key_padding_mask", mask)
    if mask.shape != ((batch, keys) if batched else (keys,)):
        turned = mask.shape == (keys, batch)
        raise MaskError(
            "key_padding_mask",
            f"has shape {list(mask.shape)}",
            f"[batch={batch}, keys={keys}]" if batched else f"[keys={keys}]",
            "key_padding_mask.T, batch before keys" if turned else None,
        )
    mask = mask.view(batch, 1, 1, keys)
    check_polarity("key_padding_mask", mask, true_means="hidden")
    return mask


def check_causal(mask: Tensor | None, shape: Shape) -> None:
    """Check the mask that `attention` returned where `is_causal` says that it is causal."""
    *_, queries, keys = shape
    if mask is None:
        raise ConfigError(
            "is_causal",
            True,
            "a hint about attn_mask, which is not given",
            f"attn_mask=~masks.causal({queries}, {keys})[0, 0]",
        )
    visible, bias = merge(mask)
    assert visible is not None, "there is a mask"
    whole = torch.ones_like(visible)
    causal = any(torch.equal(visible, whole.tril(at)) for at in {0, keys - queries})
    if not causal or (bias is not None and bias.any()):
        raise MaskError(
            "attn_mask",
            "is not causal, although is_causal says so",
            "True, or -inf, exactly at the keys after each query",
            "is_causal=False",
        )


def merge(*masks: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The masks together, as `visible` and `bias` of `attend`."""
    visible: Tensor | None = None
    bias: Tensor | None = None
    for mask in masks:
        if mask is None:
            continue
        # As a bias, -inf would make the gradients of a query that sees nothing NaN.
        hidden = mask if mask.dtype == torch.bool else mask == -math.inf
        visible = ~hidden if visible is None else visible & ~hidden
        if mask.dtype != torch.bool:
            finite = mask.masked_fill(hidden, 0.0)
            bias = finite if bias is None else bias + finite
    return visible, bias
