"""Attention over the paged cache, in interchangeable implementations.

A kernel answers one question: given the queries of this step and a cache that already holds this
step's keys and values, what does each query read? All kernels agree with `reference`.
"""

from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from models.attention_metadata import GroupMetadata
from models.config import HeadConfig
from models.errors import ConfigError
from models.kernels import dense, paged_cpu, paged_triton, reference
from models.kv_cache import CachePart
from models.scoring import Scoring

KernelName: TypeAlias = Literal["auto", "paged_cpu", "paged_triton", "dense", "reference"]


class PagedAttention(Protocol):
    """Queries `[tokens, heads, head_dim]` to outputs of the same shape.

    The heads are those that read `cache`, and `metadata` describes the group it belongs to.
    """

    def __call__(
        self, query: Tensor, cache: CachePart, metadata: GroupMetadata, scoring: Scoring
    ) -> Tensor: ...


_KERNELS: dict[str, PagedAttention] = {
    "paged_cpu": paged_cpu.paged_attention,
    "paged_triton": paged_triton.paged_attention,
    "dense": dense.paged_attention,
    "reference": reference.paged_attention,
}


# Those that cannot compute everything, and which of them is best where it can.
_WHY_UNSUPPORTED = {
    "paged_cpu": paged_cpu.why_unsupported,
    "paged_triton": paged_triton.why_unsupported,
}
_BEST = {"cpu": "paged_cpu", "cuda": "paged_triton"}


def check_kernel(name: KernelName) -> None:
    """Raises:
    ConfigError: there is no kernel of that name.
    """
    if name not in get_args(KernelName):
        raise ConfigError("kernel", name, ", ".join(get_args(KernelName)))


def resolve_kernel(
    name: KernelName, heads: HeadConfig, dtype: torch.dtype, device: torch.device
) -> str:
    """The kernel that `auto` means for these heads on this machine; any other name as it is.

    Raises:
        ConfigError: there is no kernel of that name, or it cannot compute these heads here.
    """
    check_kernel(name)
    if name == "auto":
        best = _BEST.get(device.type)
        if best is None or _WHY_UNSUPPORTED[best](heads, dtype, device) is not None:
            return "dense"
        return best
    if name in _WHY_UNSUPPORTED:
        reason = _WHY_UNSUPPORTED[name](heads, dtype, device)
        if reason is not None:
            raise ConfigError("kernel", name, f"auto, dense, reference, because {reason}")
    return name


def get_kernel(name: str) -> PagedAttention:
    """The kernel of a name that `resolve_kernel` gave."""
    return _KERNELS[name]
