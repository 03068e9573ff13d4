"""Programs that tests run, installed by `make tools`."""

import shutil
from pathlib import Path

_UNPACKED = Path(__file__).parent.parent / ".tools" / "usr" / "bin"


def tool(name: str) -> Path:
    """The path of a program: of this machine if it has one, else the unpacked one.

    Raises:
        RuntimeError: there is neither.
    """
    found = shutil.which(name) or shutil.which(name, path=str(_UNPACKED))
    if found is None:
        raise RuntimeError(f"{name} is neither on PATH nor in {_UNPACKED}; run `make tools`")
    return Path(found)
