"""Linear layers by our own operations in C++ (`linear.cpp`).

A weight is kept in the order in which it is read, so a product with few rows takes as long as its
bytes. Each output is summed in one order, however many rows there are.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.before import NOTHING, Before
from models.cpu.library import has_feature, multiplies_by_amx, why_unavailable
from models.memory import LargeMemory

WeightDType = Literal["auto", "int8"]
_LANES = 16  # as `kLanes` in lanes.h
_INT8_MAX = 127


@dataclass(frozen=True, slots=True)
class Int8Scale:
    """What the whole numbers of a weight mean.

    Attributes:
        scale: float32 `[outputs]`, what one of them is worth.
        row_sums: int32 `[outputs]`, their sums: inputs are shifted to be positive.
    """

    scale: Tensor
    row_sums: Tensor


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[outputs, inputs]` in the order in which it is read.

    Attributes:
        data: in one dimension; the outputs are filled with zeros to a multiple of 16.
        dtype: of the weight that was packed.
        int8: if its elements have 8 bits.
    """

    data: Tensor
    outputs: int
    inputs: int
    dtype: torch.dtype
    int8: Int8Scale | None = None

    def multiply(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        before: Before = NOTHING,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`; without gradients.

        Args:
            residual: added to the result, which has been rounded to its type before.
        """
        around = (before.norm, before.eps, before.swiglu, residual)
        if self.int8 is None:
            return torch.ops.headroom.packed_linear(x, self.data, self.outputs, bias, *around)  # type: ignore[no-any-return]
        return torch.ops.headroom.int8_linear(  # type: ignore[no-any-return]
            x, self.data, self.int8.scale, self.int8.row_sums, bias, *around
        )

    def unpack(self) -> Tensor:
        """The weight again, of 8 bits rounded to them."""
        weight = self.data.new_empty(self.outputs, self.inputs)
        torch.ops.headroom.unpack_weight(self.data, weight)
        if self.int8 is None:
            return weight
        return (weight * self.int8.scale[:, None]).to(self.dtype)


def why_unpackable(
    weight: Tensor, weight_dtype: WeightDType = "auto", *, although_slower: bool = False
) -> str | None:
    """Why a weight `[outputs, inputs]` cannot be packed here, or would be slower so; None if it can
    and is not.

    Where the processor has AMX and our operations cannot use it, torch's multiply bfloat16 several
    times as fast.
    """
    together = 2 if weight_dtype == "auto" else 4
    if weight.device.type != "cpu":
        return f"the device is {weight.device.type}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the type is {weight.dtype}".replace("torch.", "")
    if weight.numel() == 0 or weight.shape[1] % together:
        return f"a weight has {weight.shape[1]} inputs, which is no multiple of {together}"
    by_amx = weight_dtype == "auto" and weight.dtype == torch.bfloat16 and has_feature("amx_bf16")
    if by_amx and not although_slower and not multiplies_by_amx():
        return "the processor has AMX, which torch's operations use"
    return why_unavailable()


def pack(
    weight: Tensor, weight_dtype: WeightDType = "auto", memory: LargeMemory | None = None
) -> PackedWeight:
    """A weight `[outputs, inputs]` in the order in which it is read, in memory of its own or beside
    others that are read before and after it."""
    outputs, inputs = weight.shape
    plain, int8 = weight, None
    if weight_dtype == "int8":
        plain, scale = round_to_int8(weight)
        int8 = Int8Scale(scale, plain.sum(dim=1, dtype=torch.int32))
    padded = -(-outputs // _LANES) * _LANES
    data = (memory or LargeMemory(block_bytes=0)).zeros(padded * inputs, plain.dtype)
    torch.ops.headroom.pack_weight(plain, data)
    return PackedWeight(data, outputs, inputs, weight.dtype, int8)


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each output's weights to the nearest of 255 numbers that are as far apart as its largest
    one needs (symmetric, per channel): int8 `[outputs, inputs]` and float32 scales `[outputs]`.

    Rounding what is left once more changes nothing.
    """
    scale = weight.float().abs().amax(dim=1) / _INT8_MAX
    whole = (weight.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return whole.clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8), scale
