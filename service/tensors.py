"""Arrays on the wire, as both sides need them: NumPy only.

NumPy has no bfloat16; such elements are kept as their 16 bits.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from protos.headroom.v1 import tensor_pb2 as pb


@dataclass(frozen=True, slots=True)
class ElementType:
    """One element type.

    Attributes:
        name: as torch calls it.
        storage: how the elements lie in `Tensor.data`.
    """

    name: str
    storage: np.dtype[np.generic]

    @property
    def is_floating(self) -> bool:
        return "float" in self.name


ELEMENT_TYPES: dict[int, ElementType] = {
    pb.DATA_TYPE_FLOAT32: ElementType("float32", np.dtype("<f4")),
    pb.DATA_TYPE_FLOAT64: ElementType("float64", np.dtype("<f8")),
    pb.DATA_TYPE_BFLOAT16: ElementType("bfloat16", np.dtype("<u2")),
    pb.DATA_TYPE_FLOAT16: ElementType("float16", np.dtype("<f2")),
    pb.DATA_TYPE_INT64: ElementType("int64", np.dtype("<i8")),
    pb.DATA_TYPE_BOOL: ElementType("bool", np.dtype("?")),
}
_NUMBERS = {element.name: number for number, element in ELEMENT_TYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class WireArray:
    """Elements and what they mean.

    Attributes:
        dtype: the name of an `ElementType`.
        values: of its storage type.
    """

    dtype: str
    values: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def to_message(self) -> pb.Tensor:
        number = _NUMBERS[self.dtype]
        stored = np.ascontiguousarray(self.values, dtype=ELEMENT_TYPES[number].storage)
        return pb.Tensor(dtype=number, shape=self.shape, data=stored.tobytes())  # type: ignore[arg-type]

    @staticmethod
    def of(tensor: pb.Tensor) -> "WireArray":
        """The array of a message whose type and length are right; shares its bytes."""
        element = ELEMENT_TYPES[tensor.dtype]
        values = np.frombuffer(tensor.data, element.storage).reshape(tuple(tensor.shape))
        return WireArray(element.name, values)

    def widened(self) -> npt.NDArray[Any]:
        """The values in a type that NumPy has: bfloat16 becomes float32, exactly."""
        if self.dtype != "bfloat16":
            return self.values.astype(self.values.dtype.newbyteorder("="))
        return (self.values.astype(np.uint32) << np.uint32(16)).view(np.float32)


def expected_bytes(tensor: pb.Tensor) -> int:
    """How long the data of a tensor of a known type has to be."""
    return math.prod(tensor.shape) * ELEMENT_TYPES[tensor.dtype].storage.itemsize
