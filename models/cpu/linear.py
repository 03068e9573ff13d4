"""Linear layers by our own operation in C++ (`linear.cpp`).

A weight is kept in the order in which it is read, so a product with few rows takes as long as its
bytes. Each output is summed in one order, however many rows there are.
"""

import torch
from torch import Tensor

from models.cpu.library import why_unavailable
from models.memory import large_zeros

_LANES = 16


def can_pack(weight: Tensor) -> bool:
    """Whether a weight `[outputs, inputs]` can be packed and is better so.

    Processors with AMX multiply several times as fast by torch's own operation.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.shape[0] % _LANES == 0
        and weight.shape[1] % 2 == 0
        and weight.numel() > 0
        and not torch.cpu.get_capabilities().get("amx_bf16")
        and why_unavailable() is None
    )


def pack(weight: Tensor) -> Tensor:
    """A weight `[outputs, inputs]` as `[outputs * inputs]`, in the order in which it is read."""
    packed = large_zeros(weight.numel(), weight.dtype, weight.device)
    torch.ops.headroom.pack_weight(weight, packed)
    return packed


def unpack(packed: Tensor, inputs: int) -> Tensor:
    """The opposite of `pack`."""
    weight = packed.new_empty(packed.numel() // inputs, inputs)
    torch.ops.headroom.unpack_weight(packed, weight)
    return weight


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[..., inputs]` to `[..., outputs]`."""
    return torch.ops.headroom.packed_linear(x, packed, bias)  # type: ignore[no-any-return]
