"""Memory that is read again and again in large pieces."""

import contextlib
import mmap

import torch
from torch import Tensor

_PAGE = 2 << 20  # a large page of x86-64 and of most others
_LINE = 64


class LargeMemory:
    """Memory of a processor for many tensors, in pages as large as the system gives.

    What is read once for each step is never in the cache of address translations: of small pages
    each costs a search of its own. A tensor of a megabyte alone would have none but small ones.
    """

    def __init__(self, block_bytes: int = 64 << 20) -> None:
        """
        Args:
            block_bytes: what is asked of the system at once, at least; what is written counts.
        """
        self._block_bytes = block_bytes
        self._block: mmap.mmap | None = None
        self._at = self._end = 0

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        """`[size]`, from the start of a cache line on; it keeps the memory of its neighbours."""
        num_bytes = size * dtype.itemsize
        if not num_bytes:
            return torch.zeros(size, dtype=dtype)
        if self._block is None or self._at + num_bytes > self._end:
            self._map(max(self._block_bytes, num_bytes))
        assert self._block is not None
        tensor = torch.frombuffer(self._block, dtype=dtype, count=size, offset=self._at)
        self._at += -(-num_bytes // _LINE) * _LINE
        return tensor

    def _map(self, size: int) -> None:
        """A block that begins with a large page; the system backs what is written."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._block = mmap.mmap(-1, size + _PAGE, flags=flags)
        with contextlib.suppress(OSError, AttributeError):  # a system without large pages
            self._block.madvise(mmap.MADV_HUGEPAGE)
        start = torch.frombuffer(self._block, dtype=torch.uint8).data_ptr()
        self._at = -start % _PAGE
        self._end = self._at + size


def large_zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[size]` zeros, on a CPU in memory of their own that the system may map by large pages."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    return LargeMemory(block_bytes=0).zeros(size, dtype)
