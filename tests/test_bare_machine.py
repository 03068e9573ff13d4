"""A GPU machine may have torch, Triton, grpcio and protobuf, and little else of the lock file."""

import subprocess
import sys

# What only commands, fronts, load tests and tests of ours need.
_NEVER = (
    *("ray", "typer", "rich", "opentelemetry", "psutil", "jinja2", "plotly", "locust", "gevent"),
    *("aiohttp", "transformers", "hypothesis", "pytest"),
)
# What a server needs beside.
_SERVER = (
    *("pydantic", "pydantic_settings", "yaml", "structlog", "prometheus_client"),
    *("grpc", "grpc_health", "grpc_status", "google"),
)
_SCRIPT = """
import importlib, pkgutil, sys

class Missing:  # stands where `import` looks first
    names = {*sys.argv[1].split(","), *sys.argv[2].split(",")}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Missing())
for package in ("models", "service.engine", "loadtests.gpu"):
    module = importlib.import_module(package)
    for found in pkgutil.walk_packages(module.__path__, package + "."):
        if "._operations" in found.name:  # libraries of operations, not modules of Python
            continue
        importlib.import_module(found.name)
        print(found.name)
Missing.names -= set(sys.argv[2].split(","))
importlib.import_module("service.runtimes.standalone")
"""


def test_the_engine_needs_torch_and_the_standalone_server_no_ray() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT, ",".join(_NEVER), ",".join(_SERVER)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    names = set(run.stdout.splitlines())
    assert names >= {
        "models.gpu.decode_graphs",
        "service.engine.async_engine",
        "loadtests.gpu.__main__",
    }
