"""What can be wrong with one tensor on the wire."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from protos.headroom.v1 import tensor_pb2 as pb
from service.engine.errors import Violation
from service.tensors import ELEMENT_TYPES, WireArray, expected_bytes

FLOATING = tuple(number for number, element in ELEMENT_TYPES.items() if element.is_floating)
_MAX_SHOWN_AXES = 8


@dataclass(frozen=True, slots=True)
class NumberBounds:
    """Which numbers a tensor may hold; without bounds all that are finite.

    Attributes:
        integers: the smallest and the largest whole number.
        size: the largest absolute value of a floating number.
        minus_infinity: allowed too.
    """

    integers: tuple[int, int] | None = None
    size: float | None = None
    minus_infinity: bool = False


_ANY = NumberBounds()


def tensor_violations(
    field: str,
    tensor: pb.Tensor,
    *,
    dtypes: Collection[int],
    ranks: Collection[int],
    bounds: NumberBounds = _ANY,
) -> Iterator[Violation]:
    """Check type, shape, length and numbers of a tensor that is set.

    Args:
        dtypes: the element types that are allowed.
        ranks: how many axes are allowed.
    """
    element = ELEMENT_TYPES.get(tensor.dtype) if tensor.dtype in dtypes else None
    if element is None:
        yield Violation(f"{field}.dtype", dtype_name(tensor.dtype), _names(dtypes))
    fits = len(tensor.shape) in ranks
    if not fits:
        yield Violation(f"{field}.shape", show_shape(tensor), f"{_join(ranks)} axes")
    elif 0 in tensor.shape:
        yield Violation(f"{field}.shape", show_shape(tensor), "1 or more along each axis")
    if element is None or not fits:
        return
    expected = expected_bytes(tensor)
    if len(tensor.data) != expected:
        yield Violation(
            f"{field}.data",
            f"{len(tensor.data)} bytes long",
            f"{expected} bytes: shape {show_shape(tensor)} of {element.name}",
        )
    elif expected:
        yield from _number_violations(f"{field}.data", WireArray.of(tensor), bounds)


def dtype_name(number: int) -> str:
    if number in pb.DataType.values():
        return pb.DataType.Name(number).removeprefix("DATA_TYPE_")
    return str(number)


def show_shape(tensor: pb.Tensor) -> str:
    axes = [str(size) for size in tensor.shape[:_MAX_SHOWN_AXES]]
    more = ["..."] if len(tensor.shape) > _MAX_SHOWN_AXES else []
    return f"[{', '.join([*axes, *more])}]"


def _number_violations(field: str, array: WireArray, bounds: NumberBounds) -> Iterator[Violation]:
    """Name the first wrong number; one is enough to find the mistake."""
    values = array.values.view(np.uint8) if array.dtype == "bool" else array.values
    if array.dtype == "bool":
        wrong, allowed = values > 1, "0 or 1"
    elif array.dtype == "int64":
        if bounds.integers is None:
            return
        low, high = bounds.integers
        wrong, allowed = (values < low) | (values > high), f"{low} to {high}"
    else:
        values = array.widened()
        wrong, allowed = ~np.isfinite(values), "finite numbers"
        if bounds.minus_infinity:
            wrong, allowed = wrong & (values != -np.inf), f"{allowed} and -inf"
        if bounds.size is not None:
            wrong = wrong | (np.abs(values) > bounds.size)
            allowed = f"{allowed} of at most {bounds.size:g} in size"
    if wrong.any():
        index = tuple(int(at) for at in np.unravel_index(int(wrong.argmax()), wrong.shape))
        yield Violation(field, f"{values[index]} at {list(index)}", allowed)


def _names(dtypes: Collection[int]) -> str:
    return ", ".join(dtype_name(number) for number in dtypes)


def _join(ranks: Collection[int]) -> str:
    return " or ".join(map(str, ranks))
