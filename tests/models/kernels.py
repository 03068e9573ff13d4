"""Which kernels a test runs; one that this machine cannot run is skipped with the reason."""

import pytest
import torch

from models.cpu.library import why_unavailable
from models.kernels import KernelName, paged_cpu, paged_triton
from tests.models.batches import Case
from tests.models.variants import Variant

CPU = torch.device("cpu")
NAMES: tuple[KernelName, ...] = ("dense", "reference", "paged_cpu")

_REASON = why_unavailable()
needs_library = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


def marks(kernel: KernelName) -> tuple[pytest.MarkDecorator, ...]:
    return (needs_library,) if kernel == "paged_cpu" else ()


# For parametrize; with a machine of the right kind these are all of them.
KERNELS = tuple(pytest.param(name, marks=marks(name)) for name in NAMES)


def computes(kernel: KernelName, case: Case, variant: Variant, dtype: torch.dtype) -> bool:
    """Whether a kernel can be asked for this."""
    heads = case.heads(alibi=variant.scoring().alibi, causal=variant.causal)
    if kernel == "paged_triton":
        return paged_triton.why_unsupported(heads, dtype, CPU) is None
    return kernel != "paged_cpu" or paged_cpu.why_unsupported(heads, dtype, CPU) is None
