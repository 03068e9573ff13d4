"""Arrays to messages and back, against NumPy and torch."""

from typing import Any

import numpy as np
import pytest
import torch

from protos.headroom.v1 import tensor_pb2 as pb
from service.tensors import ELEMENT_TYPES, WireArray, expected_bytes

VALUES: dict[str, np.ndarray[Any, Any]] = {
    "float32": np.array([[1.5, -2.0, 3e-41], [np.inf, 0.0, 1e38]], np.float32),
    "float64": np.array([[1.1, -2.2, 1e-310]], np.float64),
    "float16": np.array([1.5, 65504.0], np.float16),
    "int64": np.array([[2**62], [-3]], np.int64),
    "bool": np.array([True, False]),
}


@pytest.mark.parametrize("name", VALUES)
def test_there_and_back(name: str) -> None:
    message = WireArray(name, VALUES[name]).to_message()
    assert pb.DataType.Name(message.dtype) == f"DATA_TYPE_{name.upper()}"
    assert len(message.data) == expected_bytes(message)
    back = WireArray.of(pb.Tensor.FromString(message.SerializeToString()))
    assert back.dtype == name
    assert back.shape == VALUES[name].shape
    assert np.array_equal(back.widened(), VALUES[name])


@pytest.mark.parametrize("order", [">", "<"])
def test_bytes_are_little_endian_wherever_they_come_from(order: str) -> None:
    message = WireArray("float32", np.array([1.0, 2.0], f"{order}f4")).to_message()
    assert message.data == b"\x00\x00\x80\x3f\x00\x00\x00\x40"


def test_elements_are_in_c_order_wherever_they_come_from() -> None:
    square: Any = np.arange(6, dtype=np.int64).reshape(2, 3)
    message = WireArray("int64", square.T).to_message()
    assert list(message.shape) == [3, 2]
    assert np.frombuffer(message.data, "<i8").tolist() == [0, 3, 1, 4, 2, 5]


def test_bfloat16_is_widened_as_torch_does() -> None:
    exact = torch.randn(100).bfloat16()
    exact[0], exact[1] = torch.inf, -0.0
    bits = exact.view(torch.int16).numpy().view(np.uint16)
    widened = WireArray("bfloat16", bits).widened()
    assert widened.dtype == np.float32
    assert np.array_equal(widened, exact.float().numpy())


def test_one_number_has_no_axis() -> None:
    message = WireArray("float32", np.array(2.0, np.float32)).to_message()
    assert (list(message.shape), len(message.data)) == ([], 4)
    assert WireArray.of(message).widened() == 2.0


def test_sizes_are_those_of_torch() -> None:
    for element in ELEMENT_TYPES.values():
        kind = getattr(torch, element.name)
        assert element.storage.itemsize == kind.itemsize
        assert element.is_floating == kind.is_floating_point
