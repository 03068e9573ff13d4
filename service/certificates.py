"""A server's certificate, its key, and the authority of its clients: files that may be replaced."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import structlog

from service.files import version_of

log = structlog.get_logger()


class CertificateError(ValueError):
    """Files that make no TLS server; the message names the first that is wrong."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """What the files hold, in PEM.

    Attributes:
        chain: the server's certificate, and those between it and its authority.
        client_ca: certificates of whoever vouches for clients; None asks clients for none.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None


class CertificateFiles:
    """The files, which may be replaced, one after the other, at any time.

    Files that make no TLS server, as when only one of two has been replaced yet, are reported in
    the log, and what was read before them stays.

    Args:
        client_ca: with it, only clients with a certificate of it are let in.

    Raises:
        CertificateError: the files make no TLS server.
    """

    def __init__(self, chain: Path, key: Path, client_ca: Path | None) -> None:
        self._chain, self._key, self._client_ca = chain, key, client_ca
        self._paths = [path for path in (chain, key, client_ca) if path is not None]
        self._seen = version_of(self._paths)
        self.current = self._read()

    def changed(self) -> Certificates | None:
        """What the files hold, if it is new and can be used; None if nothing is to be done."""
        version = version_of(self._paths)
        if version == self._seen:
            return None
        self._seen = version
        try:
            found = self._read()
        except CertificateError as error:
            log.error("certificates not used", error=str(error))
            return None
        if found == self.current:
            return None
        self.current = found
        log.info("certificates read", certificate=str(self._chain))
        return found

    def _read(self) -> Certificates:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        chain = _bytes(self._chain, "tls_cert")
        key = _bytes(self._key, "tls_key")
        try:
            # An empty password: nobody is there to type one.
            context.load_cert_chain(self._chain, self._key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise CertificateError(
                f"tls_cert {self._chain} and tls_key {self._key} are no certificate and its key "
                f"without a password (PEM): {error}"
            ) from error
        if self._client_ca is None:
            return Certificates(chain, key, None)
        client_ca = _bytes(self._client_ca, "client_ca")
        try:
            context.load_verify_locations(cadata=client_ca.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise CertificateError(
                f"client_ca {self._client_ca} holds no certificates (PEM): {error}"
            ) from error
        return Certificates(chain, key, client_ca)


def _bytes(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{setting} {path} cannot be read: {error.strerror}") from error
