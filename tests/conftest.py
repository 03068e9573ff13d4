"""What all tests share: determinism, and one thread so that small models are not slower."""

import os
from pathlib import Path

# Before torch or Ray is imported anywhere.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


import pytest
import torch
from hypothesis import settings

from service.logs import configure_logs

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

settings.register_profile("headroom", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("headroom")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start servers come first, so that processes that share the files end together."""
    folders = {Path(__file__).parent / name for name in ("integration", "loadtests")}
    items.sort(key=lambda item: folders.isdisjoint(item.path.parents))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logs() -> None:
    """To standard error, as a server writes them."""
    configure_logs("text", "warning")
