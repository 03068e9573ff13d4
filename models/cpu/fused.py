"""What lies between the products of a layer, by our own operations in C++ (`fused.cpp`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.cpu.library import why_unavailable


def can_fuse(*tensors: Tensor) -> bool:
    """Whether the operations here take these tensors; they have no gradients."""
    return (
        not torch.is_grad_enabled()
        and all(
            tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16)
            for tensor in tensors
        )
        and len({tensor.dtype for tensor in tensors}) == 1
        and why_unavailable() is None
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last axis, in float32 until the end."""
    return torch.ops.headroom.rms_norm(x, weight, eps)  # type: ignore[no-any-return]


def silu_mul(x: Tensor) -> Tensor:
    """`silu(gate) * up` of `[..., gate and up]`."""
    return torch.ops.headroom.silu_mul(x)  # type: ignore[no-any-return]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`models.rope.apply_rope` for pairs (i, i + rotary_dim / 2)."""
    return torch.ops.headroom.rope(x, cos, sin)  # type: ignore[no-any-return]


def store_kv(
    key: Tensor, value: Tensor, pool: Tensor, slots: Tensor, places: Sequence[int]
) -> None:
    """`models.kv_cache.CachePart.write`."""
    torch.ops.headroom.store_kv(key, value, pool, slots, places)
