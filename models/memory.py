"""Memory that is read again and again in large pieces."""

import contextlib
import mmap

import torch
from torch import Tensor


def large_zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[size]` zeros, on a CPU in memory that the system may map by large pages: what is read once
    for each step is never in the cache of address translations, and of small pages each costs a
    search of its own."""
    if device.type != "cpu" or not size:
        return torch.zeros(size, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a system without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
