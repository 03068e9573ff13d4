"""The command line as a whole."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("heavy", ["torch", "ray", "transformers", "plotly", "locust"])
def test_no_command_waits_for_what_it_does_not_need(heavy: str) -> None:
    code = f"import sys, service.cli; sys.exit({heavy!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
