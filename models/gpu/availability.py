"""Whether kernels in Triton can run here."""

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

# Before, bfloat16 is not multiplied.
_LEAST = (8, 0)


@functools.cache
def why_unavailable(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run there; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return None  # its interpreter needs nothing else
    if torch.version.hip is not None:
        return "the GPU is not one of NVIDIA's"
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability(device)) < _LEAST:
        return "the GPU's compute capability is {}.{}, below 8.0".format(*found)
    try:
        from triton.language.extra.cuda import gdc_wait  # noqa: F401
    except ImportError:
        return "Triton is too old: its kernels cannot wait for each other"
    return _why_not_compiled()


def _why_not_compiled() -> str | None:
    """What Triton misses, which compiles its driver when the first kernel starts."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler; there is no {' or '.join(compilers)}"
    header = Path(sysconfig.get_config_var("INCLUDEPY")) / "Python.h"
    return None if header.is_file() else f"Triton needs {header} (python3-dev)"
