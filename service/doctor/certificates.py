"""The certificates of a server's settings: what no client would trust is better known before.

Names are judged as clients do (RFC 6125): by subjectAltName, never by the subject.
"""

import ipaddress
import itertools
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID

from service.certificates import CertificateError, CertificateFiles, Certificates
from service.config import ServiceConfig
from service.doctor.finding import Finding, private_file

_E = TypeVar("_E", bound=x509.ExtensionType)

_SOON = timedelta(days=30)
_ISSUE = "issue it again with subjectAltName"


def examine_certificates(config: ServiceConfig) -> Iterator[Finding]:
    """Findings for `tls_cert`, `tls_key` and `client_ca`; none without them."""
    if config.tls_cert is None or config.tls_key is None:
        return
    try:
        files = CertificateFiles(config.tls_cert, config.tls_key, config.client_ca).current
        chain = x509.load_pem_x509_certificates(files.chain)
    except CertificateError as error:
        yield Finding("certificates", "error", str(error), _advice(str(error)))
        return
    except ValueError as error:  # in what OpenSSL did not have to read
        fact = f"tls_cert {config.tls_cert}: {error}"
        yield Finding("certificates", "error", fact, "write the certificates again, as PEM")
        return
    yield private_file("tls_key", config.tls_key, "belongs to tls_cert")
    yield _chain(chain)
    yield _names(chain[0], config.host)
    yield _time("tls_cert time", chain)
    if files.client_ca is not None:
        yield from _client_ca(files)


def _advice(problem: str) -> str:
    if "KEY_VALUES_MISMATCH" in problem:
        return "the key belongs to another certificate: take both from the same issue"
    if "cannot be read" in problem:
        return "name a file that the user of the server can read"
    return "PEM files are needed: server's certificate first, and a key without a password"


def _chain(chain: Sequence[x509.Certificate]) -> Finding:
    usage = _extension(chain[0], x509.ExtendedKeyUsage)
    if usage is not None and ExtendedKeyUsageOID.SERVER_AUTH not in usage:
        fact = f"{_name(chain[0])} is for other purposes than a server"
        return Finding("tls_cert", "error", fact, "issue it with extendedKeyUsage serverAuth")
    for certificate, issuer in itertools.pairwise(chain):
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            fact = f"{_name(issuer)} follows {_name(certificate)}, and has not issued it"
            advice = "order the file: the server's certificate, its issuer, the issuer of that"
            return Finding("tls_cert", "error", fact, advice)
    last = chain[-1]
    by = "itself" if last.issuer == last.subject else last.issuer.rfc4514_string()
    fact = f"{', '.join(map(_name, chain))}, issued by {by}"
    return Finding("tls_cert", "ok", fact)


def _names(certificate: x509.Certificate, host: str) -> Finding:
    """Whether clients that call the server by its `host` find it in the certificate."""
    names = _extension(certificate, x509.SubjectAlternativeName)
    if names is None:
        fact = "no subjectAltName, where alone clients look for the server's name"
        return Finding("tls_cert names", "error", fact, _ISSUE)
    hosts = names.get_values_for_type(x509.DNSName)
    addresses = names.get_values_for_type(x509.IPAddress)
    fact = ", ".join([*hosts, *map(str, addresses)])
    try:
        address = ipaddress.ip_address(host)
        known = address.is_unspecified or address in addresses
    except ValueError:
        known = any(_covers(pattern, host) for pattern in hosts)
    if not known:
        advice = f"call it by one of these names, or {_ISSUE} {host}"
        return Finding("tls_cert names", "warning", f"{fact}; host is {host}", advice)
    return Finding("tls_cert names", "ok", fact)


def _covers(pattern: str, host: str) -> bool:
    """A star stands for one whole label, the first."""
    pattern, host = pattern.lower(), host.lower()
    first, _, rest = host.partition(".")
    return pattern == host or (bool(first and rest) and pattern == f"*.{rest}")


def _client_ca(files: Certificates) -> Iterator[Finding]:
    assert files.client_ca is not None, "it was read"
    try:
        authorities = x509.load_pem_x509_certificates(files.client_ca)
    except ValueError as error:
        advice = "write the certificates again, as PEM"
        yield Finding("client_ca", "error", str(error), advice)
        return
    for one in authorities:
        constraints = _extension(one, x509.BasicConstraints)
        if one.issuer != one.subject and not (constraints is not None and constraints.ca):
            advice = "name the certificate of who issues those of clients"
            yield Finding("client_ca", "error", f"{_name(one)} is no authority", advice)
            return
    yield Finding("client_ca", "ok", ", ".join(map(_name, authorities)))
    yield _time("client_ca time", authorities)


def _time(check: str, certificates: Sequence[x509.Certificate]) -> Finding:
    """Of the one that ends first: with it ends the trust in all below."""
    now = datetime.now(UTC)
    replace = "replace the file; a running server follows"
    for one in certificates:
        if one.not_valid_before_utc > now:
            fact = f"{_name(one)} is not valid before {one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
            return Finding(check, "error", fact, "set the clock, or wait")
    first = min(certificates, key=lambda one: one.not_valid_after_utc)
    left = first.not_valid_after_utc - now
    end = f"{first.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if left <= timedelta():
        return Finding(check, "error", f"{_name(first)} expired at {end}", replace)
    fact = f"{_name(first)} expires in {left.days} days, at {end}"
    return Finding(check, "warning", fact, replace) if left < _SOON else Finding(check, "ok", fact)


def _extension(certificate: x509.Certificate, kind: type[_E]) -> _E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or f"serial number {certificate.serial_number}"
