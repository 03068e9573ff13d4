"""The classic mistakes around attention, caught before they become wrong numbers.

Most of them compute something: swapped axes broadcast, an inverted mask still sums to 1. Each
check names the argument, what was found, what is allowed and, where it can be told, what was
probably meant. What cannot be told from the tensors is not guessed: a batch as large as the number
of heads, an inverted padding mask, a scale applied to the query before and again here.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from models.errors import ConfigError, InputError, ShapeError
from models.mask_checks import check_mask

_AXES = ("batch", "heads", "tokens", "head_dim")
_DECLARED = "[batch, heads, tokens, head_dim]"
# How tensors are often laid out instead, as the permutation that mends it.
_OTHER_LAYOUTS = ((0, 2, 1, 3), (1, 0, 2, 3), (1, 2, 0, 3), (0, 1, 3, 2))


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


def check_sequences(
    query: Tensor, key: Tensor, value: Tensor, widths: tuple[int, int, int], *, batch_first: bool
) -> None:
    """Check what multi-head attention projects.

    Args:
        query, key, value: `[tokens, width]`, `[batch, tokens, width]` with `batch_first`,
            `[tokens, batch, width]` without.
        widths: of query, key and value.

    Raises:
        ShapeError: shapes that do not fit each other or the widths.
        InputError: data types that differ; a number that is not finite.
    """
    tensors = {"query": query, "key": key, "value": value}
    for (name, tensor), width in zip(tensors.items(), widths, strict=True):
        if tensor.dim() != query.dim() or tensor.dim() not in (2, 3):
            joined = tensor.dim() == 4 and tensor.shape[2] * tensor.shape[3] == width
            raise ShapeError(
                name,
                _has_shape(tensor),
                f"{_sequence_axes(batch_first)}, or [tokens, width] for all three",
                f"{name}.flatten(2), heads side by side" if joined else None,
            )
        if tensor.shape[-1] != width:
            turned = tensor.shape[-2] == width
            raise ShapeError(
                name,
                _has_shape(tensor),
                f"a width of {width} in the last axis",
                f"{name}.transpose(-1, -2)" if turned else None,
            )
        if tensor.numel() == 0:
            raise ShapeError(name, _has_shape(tensor), "1 or more of each axis")
    if query.dim() == 3:
        _check_batches(tensors, batch_first=batch_first)
    elif key.shape[0] != value.shape[0]:
        raise ShapeError("value", _has_shape(value), f"{key.shape[0]} tokens, as the key has")
    check_same_dtype(tensors)
    for name, tensor in tensors.items():
        check_finite(name, tensor)


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
    """Find the first disagreement; another layout that mends all of them was meant."""
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


def _check_batches(tensors: dict[str, Tensor], *, batch_first: bool) -> None:
    """Batches of all three and lengths of key and value agree in the declared layout."""
    first, second = (0, 1) if batch_first else (1, 0)

    def disagreement(turned: tuple[str, ...]) -> tuple[str, str] | None:
        (query, _), key, value = (
            (tensor.shape[second], tensor.shape[first])
            if name in turned
            else (tensor.shape[first], tensor.shape[second])
            for name, tensor in tensors.items()
        )
        for name, (batch, _) in (("key", key), ("value", value)):
            if batch != query:
                return name, f"batch {query}, as the query has"
        return ("value", f"{key[1]} tokens, as the key has") if key[1] != value[1] else None

    found = disagreement(())
    if found is None:
        return
    name, allowed = found
    meant = None
    if disagreement(tuple(tensors)) is None:
        meant = f"batch_first={not batch_first}"
    else:
        for turned in (("query",), ("key",), ("value",), ("key", "value")):
            if disagreement(turned) is None:
                meant = " and ".join(f"{name}.transpose(0, 1)" for name in turned)
                break
    layout = f"{_sequence_axes(batch_first)} (batch_first={batch_first})"
    raise ShapeError(name, _has_shape(tensors[name]), f"{allowed}, in {layout}", meant)


def _sequence_axes(batch_first: bool) -> str:
    return "[batch, tokens, width]" if batch_first else "[tokens, batch, width]"


def _transposition(tensors: dict[str, Tensor]) -> str | None:
    """A common other layout of one argument, or of key and value, with which all would agree."""
    for order in _OTHER_LAYOUTS:
        for names in (("query",), ("key",), ("value",), ("key", "value")):
            turned = {
                name: tensor.permute(order) if name in names else tensor
                for name, tensor in tensors.items()
            }
            if _disagreement(*turned.values()) is None:
                calls = " and ".join(f"{name}.permute{order}" for name in names)
                layout = ", ".join(_AXES[order.index(axis)] for axis in range(4))
                return f"{calls}, from [{layout}]"
    return None


def _has_shape(tensor: Tensor) -> str:
    return f"has shape {list(tensor.shape)}"
