"""Mistakes in masks: shape, type and polarity. Part of `models.attention_checks`."""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from models.errors import MaskError

TrueMeans: TypeAlias = Literal["visible", "hidden"]


def check_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Check a mask against `(batch, heads, queries, keys)`."""
    check_mask_values("mask", mask)
    batch, heads, queries, keys = shape
    fits = mask.dim() == 4 and all(
        given == size or (given == 1 and axis != 3)
        for axis, (given, size) in enumerate(zip(mask.shape, shape, strict=True))
    )
    if not fits:
        meant = {  # where sizes coincide, the last one counts: the likeliest
            (batch, heads, keys, queries): "mask.transpose(-1, -2), queries before keys",
            (batch, 1, keys, queries): "mask.transpose(-1, -2), queries before keys",
            (1, 1, keys, queries): "mask.transpose(-1, -2), queries before keys",
            (heads, queries, keys): "mask[None], one mask for each head",
            (batch, queries, keys): "mask[:, None], one mask for each batch entry",
            (batch, keys): "mask[:, None, None], one row of keys for each batch entry",
            (queries, keys): "mask[None, None]",
        }.get(tuple(mask.shape))
        raise MaskError(
            "mask",
            f"has shape {list(mask.shape)}",
            f"[batch={batch} or 1, heads={heads} or 1, queries={queries} or 1, keys={keys}]",
            meant,
        )
    check_polarity("mask", mask, true_means="visible")


def check_mask_values(field: str, mask: Tensor) -> None:
    """Check that a mask is bool, or floating and without NaN and +inf."""
    if not mask.is_floating_point():
        if mask.dtype == torch.bool:
            return
        meant = f"{field}.bool()" if _is_zeros_and_ones(mask) else None
        raise MaskError(field, f"is of {mask.dtype}", "torch.bool, or a floating type", meant)
    unusable = mask.isnan() | (mask == math.inf)
    if unusable.any():
        index = unusable.nonzero()[0].tolist()
        raise MaskError(
            field, f"is {mask[tuple(index)].item()} at {index}", "finite numbers and -inf"
        )
    if _is_zeros_and_ones(mask):
        raise MaskError(
            field,
            "holds only the numbers 0 and 1, which would be added to the scores",
            "biases such as 0 and -inf, or torch.bool",
            f"{field}.bool()",
        )


def check_polarity(field: str, mask: Tensor, *, true_means: TrueMeans) -> None:
    """Refuse a mask `[..., queries, keys]` with which no query sees any key, or whose complement
    is the causal mask."""
    if mask.is_floating_point():
        if (mask == -math.inf).all():
            raise MaskError(field, "is -inf everywhere", "a mask with which some key is seen")
        return
    visible = mask if true_means == "visible" else ~mask
    stands_for = "visible" if true_means == "visible" else "may not attend"
    if not visible.any():
        raise MaskError(
            field,
            f"is {true_means == 'hidden'} everywhere, so that no query sees any key",
            f"True means {stands_for} here",
            f"~{field}",
        )
    queries, keys = visible.shape[-2:]
    # Of one query, or of one key, it cannot be told.
    if queries > 1 and keys > 1:
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=mask.device)
        for diagonal in {0, keys - queries}:
            if torch.equal(visible, (~hidden.tril(diagonal)).expand_as(visible)):
                raise MaskError(
                    field,
                    "lets every query see exactly the keys after it",
                    f"True means {stands_for} here",
                    f"~{field}, the causal mask",
                )


def _is_zeros_and_ones(mask: Tensor) -> bool:
    zeros, ones = mask == 0, mask == 1
    return bool(ones.any() and zeros.any() and (zeros | ones).all())
