"""Attention over the paged cache, in interchangeable implementations.

A kernel answers one question: given the queries of this step and a cache that already holds this
step's keys and values, what does each query read? All kernels agree with `reference`.
"""

from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from models.attention_metadata import GroupMetadata
from models.errors import ConfigError
from models.kernels import dense, reference
from models.kv_cache import CachePart
from models.scoring import Scoring

KernelName: TypeAlias = Literal["auto", "dense", "reference"]


class PagedAttention(Protocol):
    """Queries `[tokens, heads, head_dim]` to outputs of the same shape.

    The heads are those that read `cache`, and `metadata` describes the group it belongs to.
    """

    def __call__(
        self, query: Tensor, cache: CachePart, metadata: GroupMetadata, scoring: Scoring
    ) -> Tensor: ...


_KERNELS: dict[str, PagedAttention] = {
    "dense": dense.paged_attention,
    "reference": reference.paged_attention,
}


def resolve_kernel(name: KernelName) -> str:
    """The kernel that `auto` means on this machine; any other name as it is.

    Raises:
        ConfigError: there is no kernel of that name.
    """
    if name == "auto":
        return "dense"
    if name not in _KERNELS:
        raise ConfigError("kernel", name, ", ".join(["auto", *_KERNELS]))
    return name


def get_kernel(name: KernelName) -> PagedAttention:
    return _KERNELS[resolve_kernel(name)]
