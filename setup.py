"""The kernels in C++. Everything else about the package is in pyproject.toml.

They are optional: without a compiler, on another processor, or where torch cannot be imported (pip
builds in isolation from it unless told `--no-build-isolation`) the package installs without them
and uses torch's own operations.
"""

import importlib.util
import platform

from setuptools import Extension, setup


def extensions() -> list[Extension]:
    if platform.machine() != "x86_64" or importlib.util.find_spec("torch") is None:
        return []
    from torch.utils.cpp_extension import include_paths, library_paths

    # -fopenmp when compiling only: torch has loaded its own OpenMP, and a second one would keep
    # threads of its own that fight for the cores.
    return [
        Extension(
            "models.cpu._operations",
            [f"models/cpu/{name}.cpp" for name in ("fused", "linear", "paged_attention")],
            depends=[
                f"models/cpu/{name}.h"
                for name in ("cache", "lanes", "rows", "running", "tasks", "tiles")
            ],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["c10", "torch_cpu"],
            extra_compile_args=[
                *("-std=c++20", "-O3", "-fopenmp"),
                # GCC 12 says so of its own intrinsics.
                *("-Wno-attributes", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
                *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
                *("-mavx512vnni", "-mfma"),
            ],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions())
