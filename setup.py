"""The kernels in C++. Everything else about the package is in pyproject.toml.

They are optional: without a compiler, on another processor, or where torch cannot be imported (pip
builds in isolation from it unless told `--no-build-isolation`) the package installs without them
and uses torch's own operations.

They are compiled for the processor at hand, or, if `HEADROOM_PROCESSORS` is `all`, for each kind.
"""

import copy
import importlib.util
import os
import platform
import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent


class BuildSideBySide(build_ext):
    """Extensions of the same sources at the same time, each with a folder for its own objects."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = True

    def build_extension(self, ext: Extension) -> None:
        own = copy.copy(self)
        own.build_temp = f"{self.build_temp}/{ext.name}"
        build_ext.build_extension(own, ext)


def wanted_libraries() -> dict[str, tuple[str, ...]]:
    """The names of libraries, and what a processor has that runs them."""
    library = runpy.run_path(str(HERE / "models/cpu/library.py"))
    match os.environ.get("HEADROOM_PROCESSORS", "this"):
        case "all":
            return dict(library["LIBRARIES"])
        case "this":
            return {name: library["LIBRARIES"][name] for name in library["runnable"]()[:1]}
        case other:
            raise SystemExit(f"HEADROOM_PROCESSORS is {other}; allowed: this, all")


def extension(name: str, features: tuple[str, ...]) -> Extension:
    from torch.utils.cpp_extension import include_paths, library_paths

    # -fopenmp when compiling only: torch has loaded its own OpenMP, and a second one would keep
    # threads of its own that fight for the cores.
    return Extension(
        f"models.cpu.{name}",
        [
            f"models/cpu/{source}.cpp"
            for source in ("crew", "decoder_stack", "fused", "linear", "paged_attention")
        ],
        depends=[str(path.relative_to(HERE)) for path in HERE.glob("models/cpu/*.h")],
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["c10", "torch_cpu"],
        extra_compile_args=[
            *("-std=c++20", "-O3", "-g0", "-fopenmp"),
            # Else the compiler rounds a sum of products once or twice as it inlines them, and two
            # ways to compute the same number differ.
            "-ffp-contract=off",
            # GCC 12 says so of its own intrinsics.
            *("-Wno-attributes", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
            *("-m" + feature.replace("_", "").replace("fma3", "fma") for feature in features),
        ],
        language="c++",
        optional=True,
    )


def extensions() -> list[Extension]:
    if platform.machine() != "x86_64" or importlib.util.find_spec("torch") is None:
        return []
    return [extension(name, features) for name, features in wanted_libraries().items()]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildSideBySide})
