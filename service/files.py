"""Files that may be replaced while the server runs."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

Version: TypeAlias = tuple[tuple[int, int, int] | None, ...]


def version_of(paths: Iterable[Path]) -> Version:
    """Changes when one of the files does, or is replaced by another, or goes; links are followed,
    so the switch of a mounted Kubernetes secret is seen."""
    return tuple(map(_version, paths))


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
