"""The kernels in C++. Everything else about the package is in pyproject.toml.

They are optional: without a compiler, on another processor, or where torch cannot be imported (pip
builds in isolation from it unless told `--no-build-isolation`) the package installs without them
and uses torch's own operations.
"""

import copy
import importlib.util
import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildSideBySide(build_ext):
    """Extensions of the same sources at the same time, each with a folder for its own objects."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = True

    def build_extension(self, ext: Extension) -> None:
        own = copy.copy(self)
        own.build_temp = f"{self.build_temp}/{ext.name}"
        build_ext.build_extension(own, ext)


def extensions() -> list[Extension]:
    if platform.machine() != "x86_64" or importlib.util.find_spec("torch") is None:
        return []
    from torch.utils.cpp_extension import include_paths, library_paths

    # The same sources for processors with products of bfloat16, and for those without.
    # -fopenmp when compiling only: torch has loaded its own OpenMP, and a second one would keep
    # threads of its own that fight for the cores.
    return [
        Extension(
            f"models.cpu.{name}",
            [f"models/cpu/{source}.cpp" for source in ("fused", "linear", "paged_attention")],
            depends=[
                f"models/cpu/{header}.h"
                for header in ("cache", "lanes", "rows", "running", "tasks", "tiles")
            ],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["c10", "torch_cpu"],
            extra_compile_args=[
                *("-std=c++20", "-O3", "-g0", "-fopenmp"),
                # GCC 12 says so of its own intrinsics.
                *("-Wno-attributes", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
                *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma"),
                *flags,
            ],
            language="c++",
            optional=True,
        )
        for name, flags in (("_operations", ()), ("_operations_bf16", ("-mavx512bf16",)))
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildSideBySide})
