"""Memory in large pages: tensors lie beside each other and are their own."""

import copy
import gc
import re
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.memory import LargeMemory, large_zeros

_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int8])


@given(wanted=st.lists(st.tuples(st.integers(0, 5000), _DTYPES), min_size=1, max_size=20))
def test_tensors_are_zeros_and_do_not_overlap(wanted: list[tuple[int, torch.dtype]]) -> None:
    shared = LargeMemory()
    tensors = [shared.zeros(size, dtype) for size, dtype in wanted]
    for number, (tensor, (size, dtype)) in enumerate(zip(tensors, wanted, strict=True), start=1):
        assert (tensor.shape, tensor.dtype) == ((size,), dtype)
        assert not tensor.any()
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(number)
    for number, tensor in enumerate(tensors, start=1):
        assert (tensor == number).all()


def test_a_block_begins_with_a_large_page_and_neighbours_follow() -> None:
    shared = LargeMemory()
    first, second = shared.zeros(100, torch.float32), shared.zeros(100, torch.float32)
    assert first.data_ptr() % (2 << 20) == 0
    assert second.data_ptr() - first.data_ptr() == 448  # 400 bytes, to the next line


def test_what_does_not_fit_begins_another_block() -> None:
    shared = LargeMemory(block_bytes=1024)
    small, large, last = (shared.zeros(size, torch.int8) for size in (1000, 4096, 1024))
    for tensor in (small, large, last):
        tensor.fill_(1)
        assert tensor.data_ptr() % (2 << 20) == 0
        assert tensor.all()


def test_a_copy_of_a_tensor_is_not_as_large_as_its_neighbours() -> None:
    copied = copy.deepcopy(LargeMemory().zeros(100, torch.float32))
    assert copied.untyped_storage().nbytes() == 400


def test_memory_goes_back_with_the_last_tensor() -> None:
    shared = LargeMemory()
    first, second = shared.zeros(10, torch.int8), shared.zeros(10, torch.int8)
    block = weakref.ref(shared._block)
    del shared, first
    gc.collect()
    assert block() is not None
    del second
    gc.collect()
    assert block() is None


_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not _SETTING.exists() or "[never]" in _SETTING.read_text(), reason="no large pages here"
)
def test_small_tensors_are_in_large_pages_together() -> None:
    shared = LargeMemory()
    tensors = [shared.zeros(1 << 20, torch.int8) for _ in range(16)]
    for tensor in tensors:
        tensor.fill_(1)
    # However little is left of them: alone, none would have one.
    assert _large_pages_at(tensors[0].data_ptr()) > 0


def _large_pages_at(address: int) -> int:
    """Bytes in large pages of the piece of memory with this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(bound, 16) for bound in bounds.groups())
            inside = start <= address < end
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError("nothing is at this address")


def test_nothing_is_no_memory() -> None:
    assert large_zeros(0, torch.float32, torch.device("cpu")).numel() == 0
    assert LargeMemory().zeros(0, torch.int8).numel() == 0
