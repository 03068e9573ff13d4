"""Marks what needs the compiled operations."""

import pytest

from models.cpu.library import why_unavailable

needs_library = pytest.mark.skipif(
    why_unavailable() is not None, reason=f"no C++ operations: {why_unavailable()}"
)
