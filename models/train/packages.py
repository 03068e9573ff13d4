"""Debian packages that carry text: fetched without root, verified, unpacked beside one another."""

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import CorpusError


@dataclass(frozen=True, slots=True)
class Package:
    """One version of a Debian package, and the SHA-256 of its file."""

    name: str
    version: str
    sha256: str


def unpack(packages: Sequence[Package], cache: Path) -> Path:
    """The directory in `cache` that holds the files of all packages, as below `/`.

    A package file that lies in `cache` is used; one that is missing is fetched with apt-get.

    Args:
        cache: an absolute path.

    Raises:
        CorpusError: a package is not to be had, or is not the one that was recorded; or `cache`
            cannot be written to.
    """
    root = cache / "root"
    for package in packages:
        try:
            _unpack(package, cache, root)
        except OSError as error:
            raise CorpusError(f"{cache} cannot hold packages: {error}") from error
    return root


def _unpack(package: Package, cache: Path, root: Path) -> None:
    marker = cache / f"{package.sha256}.unpacked"
    if marker.exists():
        return
    file = _find(package, cache) or _download(package, cache)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise CorpusError(f"{file} has SHA-256 {found}; allowed: {package.sha256}")
    _run(["dpkg-deb", "-x", str(file), str(root)], package, cache)
    marker.touch()


def _find(package: Package, cache: Path) -> Path | None:
    # A colon in a version is escaped in the name of the file.
    version = package.version.replace(":", "%3a")
    return next(iter(sorted(cache.glob(f"{package.name}_{version}_*.deb"))), None)


def _download(package: Package, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", f"{package.name}={package.version}"], package, cache)
    file = _find(package, cache)
    if file is None:
        raise CorpusError(f"apt-get left no file of {package.name} {package.version} in {cache}")
    return file


def _run(command: list[str], package: Package, cache: Path) -> None:
    what = f"package {package.name} {package.version}"
    help_ = f"put its .deb into {cache}, or train on the standard library alone (--minimal)"
    if shutil.which(command[0]) is None:
        raise CorpusError(f"{what} is missing and there is no {command[0]} here; {help_}")
    done = subprocess.run(command, cwd=cache, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CorpusError(
            f"{what}: {' '.join(command[:2])} failed: {reason}; "
            f"refresh the list of packages (apt-get update), {help_}"
        )
