"""Linear layers by our own operation in C++ (`linear.cpp`).

A weight is kept in the order in which it is read, so a product with few rows takes as long as its
bytes. Each output is summed in one order, however many rows there are.
"""

import torch
from torch import Tensor

from models.cpu.library import has_feature, why_unavailable
from models.memory import large_zeros

_LANES = 16  # as `kLanes` in lanes.h


def can_pack(weight: Tensor) -> bool:
    """Whether a weight `[outputs, inputs]` can be packed and is better so.

    Processors with AMX multiply bfloat16 several times as fast by torch's own operation.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.shape[1] % 2 == 0
        and weight.numel() > 0
        and not (weight.dtype == torch.bfloat16 and has_feature("amx_bf16"))
        and why_unavailable() is None
    )


def pack(weight: Tensor) -> Tensor:
    """A weight `[outputs, inputs]` in the order in which it is read, in one dimension; the outputs
    are filled with zeros to a multiple of 16."""
    outputs, inputs = weight.shape
    padded = -(-outputs // _LANES) * _LANES
    packed = large_zeros(padded * inputs, weight.dtype, weight.device)
    torch.ops.headroom.pack_weight(weight, packed)
    return packed


def unpack(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The opposite of `pack`."""
    weight = packed.new_empty(outputs, inputs)
    torch.ops.headroom.unpack_weight(packed, weight)
    return weight


def multiply(x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """`[..., inputs]` to `[..., outputs]`; without gradients."""
    return torch.ops.headroom.packed_linear(x, packed, outputs, bias)  # type: ignore[no-any-return]
