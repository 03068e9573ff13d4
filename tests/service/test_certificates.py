"""Certificates of a server: what is refused before it starts, and that they are followed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from service.certificates import CertificateError, CertificateFiles
from tests.certificates import Authority, Pair


@pytest.fixture
def authority() -> Authority:
    return Authority("a")


def _with_password(pair: Pair) -> bytes:
    key = serialization.load_pem_private_key(pair.key, None)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


def _write(directory: Path, authority: Authority) -> tuple[Path, Path, Path]:
    paths = (directory / "tls.crt", directory / "tls.key", directory / "ca.crt")
    authority.issue("server").write(*paths[:2])
    paths[2].write_bytes(authority.pem)
    return paths


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda crt, key, ca, a: crt.unlink(), "tls_cert .* cannot be read: No such file"),
        (lambda crt, key, ca, a: key.unlink(), "tls_key .* cannot be read: No such file"),
        (lambda crt, key, ca, a: ca.unlink(), "client_ca .* cannot be read: No such file"),
        (lambda crt, key, ca, a: crt.write_text("x"), "are no certificate and its key"),
        (lambda crt, key, ca, a: key.write_bytes(a.issue("b").key), "are no certificate and its"),
        (
            lambda crt, key, ca, a: key.write_bytes(_with_password(a.issue("b"))),
            "without a password",
        ),
        (lambda crt, key, ca, a: ca.write_text("x"), "client_ca .* holds no certificates"),
        (lambda crt, key, ca, a: ca.write_bytes(b"\xff"), "client_ca .* holds no certificates"),
    ],
)
def test_files_that_make_no_server_are_named(
    tmp_path: Path,
    authority: Authority,
    spoil: Callable[[Path, Path, Path, Authority], object],
    expected: str,
) -> None:
    paths = _write(tmp_path, authority)
    spoil(*paths, authority)
    with pytest.raises(CertificateError, match=expected) as caught:
        CertificateFiles(*paths)
    assert "\n" not in str(caught.value)


def test_only_whole_pairs_are_taken(tmp_path: Path, authority: Authority) -> None:
    """A certificate and its key are replaced one after the other."""
    crt, key, ca = _write(tmp_path, authority)
    files = CertificateFiles(crt, key, ca)
    before = files.current
    assert files.changed() is None
    new = authority.issue("new")
    crt.write_bytes(new.certificate)
    assert files.changed() is None
    assert files.current == before
    key.write_bytes(new.key)
    changed = files.changed()
    assert changed is not None
    assert (changed.chain, changed.key) == (new.certificate, new.key)
    assert files.current == changed
    assert files.changed() is None


def test_a_switched_link_is_followed(tmp_path: Path, authority: Authority) -> None:
    """As Kubernetes replaces the files of a secret, all at once."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name, authority)
    current = tmp_path / "current"
    current.symlink_to("one")
    files = CertificateFiles(current / "tls.crt", current / "tls.key", None)
    other = tmp_path / "other"
    other.symlink_to("two")
    other.replace(current)
    changed = files.changed()
    assert changed is not None
    assert changed.chain == (tmp_path / "two" / "tls.crt").read_bytes()
