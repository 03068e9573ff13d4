"""Packages are fetched once, verified, and named where they are missing."""

import dataclasses
from pathlib import Path

import pytest

from models.errors import CorpusError
from models.train.packages import unpack
from tests.models.train.packages import with_packages


def test_a_package_is_fetched_and_unpacked_once(tmp_path: Path) -> None:
    with with_packages(tmp_path) as (cache, sources):
        (package,) = sources[-1].packages
        root = unpack([package], cache)
        assert (root / "usr/share/wordnet/data.adv").is_file()
        (tmp_path / "mirror" / package.name).unlink()
        (cache / "wordnet-base_1%3a3.0-37_all.deb").unlink()
        assert unpack([package], cache) == root, "nothing is needed any more"


def test_a_file_that_lies_there_is_used(tmp_path: Path) -> None:
    with with_packages(tmp_path) as (cache, sources):
        (package,) = sources[0].packages
        cache.mkdir()
        lent = cache / f"{package.name}_{package.version}_all.deb"
        (tmp_path / "mirror" / package.name).rename(lent)
        assert (unpack([package], cache) / "usr/share/doc").is_dir()


def test_another_file_is_refused(tmp_path: Path) -> None:
    with with_packages(tmp_path) as (cache, sources):
        package = dataclasses.replace(sources[0].packages[0], sha256="0" * 64)
        with pytest.raises(CorpusError, match=rf"has SHA-256 [0-9a-f]{{64}}; allowed: {'0' * 64}"):
            unpack([package], cache)
        assert not (cache / "root").exists()


def test_a_package_that_is_not_to_be_had_is_named(tmp_path: Path) -> None:
    with with_packages(tmp_path) as (cache, sources):
        (package,) = sources[-1].packages
        (tmp_path / "mirror" / package.name).unlink()
        with pytest.raises(
            CorpusError,
            match=r"package wordnet-base 1:3\.0-37: apt-get download failed: E: no wordnet-base="
            r"1:3\.0-37; refresh .* \(apt-get update\), put its \.deb into .*--minimal",
        ):
            unpack([package], cache)


def test_a_machine_without_apt_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with with_packages(tmp_path) as (cache, sources):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(CorpusError, match="is missing and there is no apt-get here; put its"):
            unpack(sources[0].packages, cache)
