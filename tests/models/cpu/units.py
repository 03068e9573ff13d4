"""What products of bfloat16 and of 8 bits can be computed by, whatever this processor has."""

import contextlib
from collections.abc import Iterator

import torch

from models.cpu import library

TILES = ["emulated_amx", *(["amx"] if library.multiplies_by_amx() else [])]
UNITS = ["vectors", *TILES]


@contextlib.contextmanager
def multiplying_by(unit: str) -> Iterator[None]:
    torch.ops.headroom.multiply_by(unit)
    try:
        yield
    finally:
        torch.ops.headroom.multiply_by("amx" if library.multiplies_by_amx() else "vectors")
