"""The classic mistakes around attention, caught before they become wrong numbers.

Most of them compute something: swapped axes broadcast, an inverted mask still sums to 1. Each
check names the argument, what was found, what is allowed and, where it can be told, what was
probably meant. What cannot be told from the tensors is not guessed: a batch as large as the number
of heads, an inverted padding mask, a scale applied to the query before and again here.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from models.errors import ConfigError, InputError, MaskError, ShapeError

TrueMeans: TypeAlias = Literal["visible", "hidden"]
_AXES = ("batch", "heads", "tokens", "head_dim")
_DECLARED = "[batch, heads, tokens, head_dim]"


def check_attention_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    window: int | Sequence[int | None] | None = None,
) -> None:
    """Check what `attend` is given: `reference.attend`, `dense.attend` or `attend_by_head`.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, kv_heads, keys, head_dim or value_dim]`.
        mask: `[batch or 1, heads or 1, queries or 1, keys]`; bool, where True means visible, or
            floating, added to the scaled scores.
        window: a query sees so many keys, its own included; one number, or one for each head.

    Raises:
        ShapeError: shapes that do not fit each other.
        MaskError: shape, type or polarity of the mask.
        InputError: data types that differ; a number that is not finite.
        ConfigError: a window that sees nothing, or another number of windows than of heads.
    """
    _check_axes(query, key, value)
    check_same_dtype({"query": query, "key": key, "value": value})
    _check_shapes(query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_finite(name, tensor)
    if mask is not None:
        check_mask(mask, (*query.shape[:3], key.shape[2]))
    if window is not None:
        check_window(window, query.shape[1])


def check_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Check a mask against `(batch, heads, queries, keys)`."""
    check_mask_values("mask", mask)
    batch, heads, queries, keys = shape
    fits = mask.dim() == 4 and all(
        given == size or (given == 1 and axis != 3)
        for axis, (given, size) in enumerate(zip(mask.shape, shape, strict=True))
    )
    if not fits:
        meant = {
            (queries, keys): "mask[None, None]",
            (batch, keys): "mask[:, None, None], one row of keys for each batch entry",
            (batch, queries, keys): "mask[:, None], one mask for each batch entry",
            (heads, queries, keys): "mask[None], one mask for each head",
            (batch, heads, keys, queries): "mask.transpose(-1, -2), queries before keys",
            (batch, 1, keys, queries): "mask.transpose(-1, -2), queries before keys",
            (1, 1, keys, queries): "mask.transpose(-1, -2), queries before keys",
        }.get(tuple(mask.shape))
        raise MaskError(
            "mask",
            f"has shape {list(mask.shape)}",
            f"[{batch} or 1, {heads} or 1, {queries} or 1, {keys}], "
            "which is [batch, heads, queries, keys]",
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


def check_window(window: int | Sequence[int | None], num_heads: int) -> None:
    windows = [window] * num_heads if isinstance(window, int) else window
    if len(windows) != num_heads:
        raise ConfigError("window", f"{len(windows)} windows", f"one for each of {num_heads} heads")
    for size in windows:
        if size is not None and size < 1:
            raise ConfigError(
                "window", size, "1 (a query sees its own key) or more", "None, which sees all keys"
            )


def check_scale(scale: float, head_dim: int) -> None:
    """Check the factor on query · key.

    1 and 1 / head_dim are legitimate (T5, muP), so that a scale left out or applied twice passes.

    Raises:
        ConfigError: not a finite number above 0, or a divisor where the factor is expected.
    """
    allowed = "a finite number above 0, by which scores are multiplied"
    if not 0 < scale < math.inf:
        raise ConfigError("scale", scale, allowed)
    if head_dim > 1 and any(math.isclose(scale, d) for d in (head_dim, math.sqrt(head_dim))):
        raise ConfigError("scale", scale, allowed, f"{head_dim**-0.5:g}, head_dim ** -0.5")


def check_finite(field: str, tensor: Tensor) -> None:
    """Raise InputError with the index of the first number that is not finite."""
    finite = tensor.isfinite()
    if not finite.all():
        index = (~finite).nonzero()[0].tolist()
        raise InputError(field, f"is {tensor[tuple(index)].item()} at {index}", "finite numbers")


def check_same_dtype(tensors: dict[str, Tensor]) -> None:
    """Check that all are floating and of the first one's type."""
    (first, like), *_ = tensors.items()
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(name, f"is of {tensor.dtype}", "a floating type")
        if tensor.dtype != like.dtype:
            raise InputError(name, f"is of {tensor.dtype}", f"{like.dtype}, as {first} is")


def _check_axes(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            meant = f"{name}[None], a batch of one" if tensor.dim() == 3 else None
            raise ShapeError(name, _has_shape(tensor), f"4 axes, {_DECLARED}", meant)
        for axis, size in zip(_AXES, tensor.shape, strict=True):
            if size == 0:
                raise ShapeError(name, f"{_has_shape(tensor)} with no {axis}", "1 or more of each")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Find the first disagreement; a transposition that mends all of them is what was meant."""
    found = _disagreement(query, key, value)
    if found is None:
        return
    name, allowed = found
    tensors = {"query": query, "key": key, "value": value}
    raise ShapeError(name, _has_shape(tensors[name]), allowed, _transposition(tensors))


def _disagreement(query: Tensor, key: Tensor, value: Tensor) -> tuple[str, str] | None:
    """The argument that disagrees with those before it, and what it would have to be."""
    batch, heads, _, head_dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != batch:
            return name, f"batch {batch}, as the query has, in {_DECLARED}"
    if key.shape[3] != head_dim:
        return "key", f"head_dim {head_dim}, as the query has, in {_DECLARED}"
    if key.shape[1] != value.shape[1]:
        return "value", f"{key.shape[1]} kv_heads, as the key has, in {_DECLARED}"
    if key.shape[2] != value.shape[2]:
        return "value", f"{key.shape[2]} tokens, as the key has, in {_DECLARED}"
    if heads % key.shape[1]:
        return "key", f"a number of kv_heads that divides the query's {heads} heads in {_DECLARED}"
    return None


def _transposition(tensors: dict[str, Tensor]) -> str | None:
    """The exchange of two neighbouring axes of one or two arguments that makes all agree."""
    for names in (("query",), ("key",), ("value",), ("key", "value")):
        for first, second in pairwise(range(4)):
            turned = {
                name: tensor.transpose(first, second) if name in names else tensor
                for name, tensor in tensors.items()
            }
            if _disagreement(*turned.values()) is None:
                calls = " and ".join(f"{name}.transpose({first}, {second})" for name in names)
                return f"{calls}: {_AXES[first]} before {_AXES[second]}"
    return None


def _has_shape(tensor: Tensor) -> str:
    return f"has shape {list(tensor.shape)}"


def _is_zeros_and_ones(mask: Tensor) -> bool:
    zeros, ones = mask == 0, mask == 1
    return bool(ones.any() and zeros.any() and (zeros | ones).all())
