"""What the machine can do: bytes and operations per second, measured here and now."""

import itertools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from models.config import DTypeName

# Beyond every cache of a CPU or GPU in use.
COPY_BYTES = 256 * 2**20
_MIN_COPY_BYTES = 2**20
_MAX_COPY_BYTES = 2**30
# Repeats of a measurement, fewer where one takes long (16-bit products on old CPUs).
_REPEATS = 7
_MAX_SECONDS = 0.5
_MATMUL_SIZE = {"cpu": 512, "cuda": 8192}
_DTYPES: tuple[DTypeName, ...] = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """The two slopes of a roofline (Williams et al. 2009).

    Attributes:
        bytes_per_s: read and written, by a plain copy.
        flops_per_s: multiplications and additions of a large matrix product, by type.
    """

    bytes_per_s: float
    flops_per_s: dict[str, float]

    def ridge(self, dtype: DTypeName) -> float:
        """Operations per byte from which on arithmetic takes longer than reading."""
        return self.flops_per_s[dtype] / self.bytes_per_s

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "MachineLimits":
        """The opposite of `to_dict`.

        Raises:
            ValueError: a field is missing or not what `to_dict` writes.
        """
        rates = fields.get("flops_per_s")
        if not isinstance(rates, Mapping) or set(rates) != set(_DTYPES):
            raise ValueError(f"flops_per_s is {rates!r}; allowed: one number for {_DTYPES}")
        return MachineLimits(
            _rate(fields, "bytes_per_s"), {dtype: _rate(rates, dtype) for dtype in _DTYPES}
        )


def measure_machine(
    device: torch.device,
    footprint: int = COPY_BYTES,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MachineLimits:
    """Measure bandwidth and matrix products; takes seconds.

    Args:
        footprint: bytes that a step reads. What fits into a cache is copied faster, so the copy
            moves as much, between 1 MiB and 1 GiB.
        on_progress: told how many measurements of how many are done.
    """
    total = 1 + len(_DTYPES)
    done = itertools.count(1)
    bandwidth = copy_bandwidth(device, min(max(footprint, _MIN_COPY_BYTES), _MAX_COPY_BYTES))
    on_progress(next(done), total)
    rates: dict[str, float] = {}
    for dtype in _DTYPES:
        rates[dtype] = _matmul_rate(device, getattr(torch, dtype))
        on_progress(next(done), total)
    return MachineLimits(bandwidth, rates)


def copy_bandwidth(device: torch.device, num_bytes: int = COPY_BYTES) -> float:
    """Bytes per second, read and written, of a plain copy of so many bytes."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best_seconds(device, lambda: target.copy_(source))


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = _MATMUL_SIZE[device.type]
    left = torch.ones(size, size, device=device, dtype=dtype)
    right = torch.ones_like(left)
    return 2 * size**3 / _best_seconds(device, lambda: left @ right)


def _best_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The shortest of several runs: what disturbs a run only makes it longer."""
    work()  # touches its memory for the first time
    best, begun = float("inf"), time.perf_counter()
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() - begun > _MAX_SECONDS:
            break
    return best


def _rate(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} is {value!r}; allowed: a number above 0")
    return float(value)
