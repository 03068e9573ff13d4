"""How kernels follow one another on a GPU."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_HOPPER = 9


@triton.jit
def await_previous(overlaps: tl.constexpr):
    """Has to come before all reads and writes of a kernel that `launch_options` are given to: it
    may be launched before the kernel ahead of it has ended, and waits here until it has."""
    if overlaps:
        gdc_wait()
        gdc_launch_dependents()


@functools.cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Options of a launch that begins while the one before still runs (programmatic dependent
    launch); a kernel of a decode step takes about as long as its launch."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < _HOPPER:
        return {"overlaps": False}
    return {"overlaps": True, "launch_pdl": True}
