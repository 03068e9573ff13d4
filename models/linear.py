"""Linear layers, and how their weights lie in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from models.cpu.linear import can_pack, multiply, pack, unpack


class Linear(nn.Linear):
    """nn.Linear, whose weight may be packed: `weight` then has one dimension, and its elements in
    the order in which the processor reads them.

    Saving gives the plain weight; loading and moving go back to it.
    """

    def pack(self) -> None:
        """Keep the packed weight instead, where that is faster; for inference."""
        if not self._is_packed and can_pack(self.weight):
            self.weight = nn.Parameter(pack(self.weight.detach()), requires_grad=False)

    def unpack(self) -> None:
        """Keep the plain weight again."""
        if self._is_packed:
            self.weight = nn.Parameter(self.dense_weight, requires_grad=False)

    @property
    def dense_weight(self) -> Tensor:
        """The weight `[outputs, inputs]`; a copy if it is packed."""
        if not self._is_packed:
            return self.weight
        return unpack(self.weight, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_packed:
            return super().forward(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return linear(x, self.dense_weight, self.bias)
        return multiply(x, self.weight, self.out_features, self.bias)

    @property
    def _is_packed(self) -> bool:
        return self.weight.dim() == 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear":
        self.unpack()  # the order depends on the type and the device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_packed:
            destination[f"{prefix}weight"] = self.dense_weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)
