"""The compiled operations, loaded when they are first needed.

They are compiled when the package is installed, where there is a compiler, once for each kind of
processor (`setup.py`). Loading them on another could execute instructions that it does not have, so
it is asked first.
"""

import functools
import importlib.machinery
from pathlib import Path

import torch

_AVX2 = ("avx2", "fma3")
_AVX512 = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni", "fma3")
# What a processor must have for each library, the best first.
LIBRARIES = {
    "_operations_avx512_bf16": (*_AVX512, "avx512_bf16"),
    "_operations_avx512": _AVX512,
    "_operations_avx2": _AVX2,
}
_AMX_FEATURES = ("amx_tile", "amx_bf16", "amx_int8")


def has_feature(name: str) -> bool:
    """Whether the processor has a feature, by the name that torch gives it; a torch that cannot
    tell means no."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    return ask is not None and bool(ask().get(name))


def runnable() -> list[str]:
    """The libraries whose instructions this processor has, the best first."""
    return [stem for stem, features in LIBRARIES.items() if all(map(has_feature, features))]


@functools.cache
def why_unavailable() -> str | None:
    """Why this machine cannot run it, loading it if it can; None if it can."""
    missing = [name for name in _AVX2 if not has_feature(name)]
    if missing:
        return f"the processor lacks {', '.join(missing)}"
    library = _library()
    if library is None:
        return "it was not compiled when the package was installed"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"it does not load: {error.__cause__ or error}"
    if _amx_works():
        torch.ops.headroom.multiply_by("amx")
    return None


def multiplies_by_amx() -> bool:
    """Whether our linear layers use the matrix unit of this processor; vectors if not."""
    return why_unavailable() is None and _amx_works()


@functools.cache
def _amx_works() -> bool:
    """Of the loaded library; a child process tries it."""
    return all(map(has_feature, _AMX_FEATURES)) and bool(torch.ops.headroom.amx_works())


def vectors_in_use() -> str | None:
    """The name of the vectors of the loaded library; None if none is loaded."""
    library = None if why_unavailable() is not None else _library()
    if library is None:
        return None
    return "AVX-512" if "avx512" in library.name else "AVX2"


def _library() -> Path | None:
    """The best that was compiled and runs here."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    names = (f"{stem}{suffix}" for stem in runnable() for suffix in suffixes)
    found = (Path(__file__).with_name(name) for name in names)
    return next((path for path in found if path.exists()), None)
