"""Linear layers, and how their weights lie in memory."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from models.before import Before
from models.cpu.linear import PackedWeight, WeightDType, pack, why_unpackable
from models.gpu import fused as gpu_fused
from models.memory import LargeMemory


class BeforeLinear(Protocol):
    """What comes right before a linear layer: a function of its rows."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def fused(self, dtype: torch.dtype) -> Before | None:
        """The same for rows of a type, as part of a product; None if it cannot be."""


class Linear(nn.Linear):
    """nn.Linear, whose weight may be packed: `weight` then has one dimension, and its elements in
    the order in which the processor reads them.

    Saving gives the plain weight; loading and moving go back to it.
    """

    _packed: PackedWeight | None = None

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    @property
    def packed(self) -> PackedWeight:
        assert self._packed is not None, "the weight is plain"
        return self._packed

    def pack(
        self,
        weight_dtype: WeightDType = "auto",
        *,
        although_slower: bool = False,
        memory: LargeMemory | None = None,
    ) -> None:
        """Keep the packed weight instead, where that can be; for inference.

        Args:
            weight_dtype: `int8` rounds the weight, of which `unpack` gives what is left.
            although_slower: also where torch's own operation is faster.
            memory: which it shares with other weights.
        """
        if self._packed is not None:
            return
        if why_unpackable(self.weight, weight_dtype, although_slower=although_slower) is None:
            self._packed = pack(self.weight.detach(), weight_dtype, memory)
            self.weight = nn.Parameter(self._packed.data, requires_grad=False)

    def unpack(self) -> None:
        """Keep the plain weight again."""
        if self._packed is not None:
            self.weight = nn.Parameter(self.dense_weight, requires_grad=False)
            self._packed = None

    @property
    def dense_weight(self) -> Tensor:
        """The weight `[outputs, inputs]`; a copy if it is packed."""
        return self.weight if self._packed is None else self._packed.unpack()

    @property
    def dtype(self) -> torch.dtype:
        """The type of inputs and outputs."""
        return self.weight.dtype if self._packed is None else self._packed.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(
        self, x: Tensor, before: BeforeLinear | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`residual + before(x) @ weight.T + bias`; in one operation where the weight is packed,
        or a GPU multiplies one row."""
        multiply: Callable[..., Tensor]
        if self._packed is not None and not (torch.is_grad_enabled() and x.requires_grad):
            multiply, fuses = self._packed.multiply, True
        elif self._packed is None and gpu_fused.can_multiply(x, self.weight):
            multiply = functools.partial(gpu_fused.multiply, self.weight)
            fuses = gpu_fused.is_one_row(x)
        else:
            rows = x if before is None else before(x)
            product = linear(rows, self.dense_weight, self.bias)
            return product if residual is None else residual + product
        fused = before.fused(self.dtype) if before is not None and fuses else None
        if fused is None:
            rows = x if before is None else before(x)
            return multiply(rows, self.bias, residual=residual)
        return multiply(x, self.bias, before=fused, residual=residual)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear":
        self.unpack()  # the order depends on the type and the device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is not None:
            destination[f"{prefix}weight"] = self.dense_weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)


class LowRankLinear(nn.Module):
    """A linear layer whose weight is a product of two, `[outputs, rank] @ [rank, inputs]`: fewer
    bytes to read where the rank is small. Its bias is that of `expand`."""

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.reduce = Linear(inputs, rank, bias=False)
        self.expand = Linear(rank, outputs, bias=bias)

    @property
    def dense_weight(self) -> Tensor:
        """The weight `[outputs, inputs]`, a copy."""
        return self.expand.dense_weight @ self.reduce.dense_weight

    @property
    def weight(self) -> Tensor:
        return self.dense_weight

    @property
    def bias(self) -> Tensor:
        return self.expand.bias

    @property
    def dtype(self) -> torch.dtype:
        return self.expand.dtype

    @property
    def device(self) -> torch.device:
        return self.expand.device

    def forward(
        self, x: Tensor, before: BeforeLinear | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`residual + before(x) @ weight.T + bias`."""
        return self.expand(self.reduce(x, before), None, residual)  # type: ignore[no-any-return]


def make_projection(
    inputs: int, outputs: int, *, bias: bool, rank: int | None
) -> Linear | LowRankLinear:
    """A linear layer; as two matrices if it has a rank."""
    if rank is None:
        return Linear(inputs, outputs, bias=bias)
    return LowRankLinear(inputs, outputs, rank, bias=bias)
