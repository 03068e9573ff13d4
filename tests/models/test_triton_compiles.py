"""What Triton's interpreter computes can also be compiled for a GPU: it allows more than the
compiler does."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def test_kernels_compile_and_multiply_by_matrix_units(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.models.compile_triton"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    products = ["multiply_rows -", "multiply_row -", "multiply_rows mma", *["multiply_row -"] * 2]
    others = ["rms_norm -", "silu_mul -"]
    halves = ["rotate_and_store -", "attend_spans mma", "join_spans -"]
    wide = ["rotate_and_store -", "attend_spans -", "join_spans -"]
    assert run.stdout.splitlines() == [*products, *others, *halves, *halves, *wide, *halves]
