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


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of `[rows, width]`, and where it is first, both `[rows]`; NaN where
    one of the row is."""
    return torch.ops.headroom.largest(x)  # type: ignore[no-any-return]


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """`models.rope.apply_rope`."""
    return torch.ops.headroom.rope(x, cos, sin, interleaved)  # type: ignore[no-any-return]


def rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    pool: Tensor,
    slots: Tensor,
    places: Sequence[int],
    *,
    interleaved: bool,
) -> None:
    """`models.rope.apply_rope` of the queries, where they are, and of the keys, which go to the
    cache with the values as by `models.kv_cache.CachePart.write`."""
    cos, sin = rotation or (None, None)
    torch.ops.headroom.rotate_and_store(
        query, key, value, cos, sin, interleaved, pool, slots, places
    )
