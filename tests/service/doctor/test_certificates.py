"""The doctor names what clients would not trust; OpenSSL agrees."""

import datetime
import ipaddress
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from service.config import ServiceConfig
from service.doctor.certificates import examine_certificates
from service.doctor.finding import Finding
from tests.certificates import Authority, Pair

_DAY = datetime.timedelta(days=1)
AUTHORITY = Authority("first")
GOOD = AUTHORITY.issue("server", expires=90 * _DAY + _DAY / 2)


class Files:
    """Certificate, key and clients' authority in a directory, and what is found of them."""

    def __init__(self, directory: Path) -> None:
        self.certificate = directory / "tls.crt"
        self.key = directory / "tls.key"
        self.client_ca = directory / "clients.crt"
        self.write(GOOD)

    def write(self, pair: Pair) -> None:
        pair.write(self.certificate, self.key)
        self.key.chmod(0o600)

    def findings(self, **settings: object) -> dict[str, Finding]:
        given = {"tls_cert": self.certificate, "tls_key": self.key} | settings
        config = ServiceConfig(**given, allow_insecure=True)  # type: ignore[arg-type]
        return {one.check: one for one in examine_certificates(config)}

    def openssl(self, *flags: str) -> bool:
        """Whether OpenSSL verifies the certificate for a server."""
        authority = self.certificate.with_name("ca.crt")
        authority.write_bytes(AUTHORITY.pem)
        verify = ["openssl", "verify", "-purpose", "sslserver", "-CAfile", str(authority), *flags]
        return subprocess.run([*verify, str(self.certificate)], capture_output=True).returncode == 0


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def _names(*names: x509.GeneralName) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(names)


def test_without_certificates_nothing_is_said() -> None:
    assert list(examine_certificates(ServiceConfig())) == []


def test_what_is_as_it_should_be(files: Files) -> None:
    files.client_ca.write_bytes(Authority("clients", expires=40 * _DAY).pem)
    found = files.findings(client_ca=files.client_ca)
    assert [one for one in found.values() if one.level != "ok" or one.advice] == []
    assert found["tls_cert"].fact == "CN=server, issued by CN=first"
    assert found["tls_cert names"].fact == "127.0.0.1"
    assert found["tls_cert time"].fact.startswith("CN=server expires in 90 days, at ")
    assert found["client_ca"].fact == "CN=clients"
    assert found["client_ca time"].fact.startswith("CN=clients expires in ")
    assert files.openssl()


@pytest.mark.parametrize("setting", ["tls_cert", "tls_key", "client_ca"])
def test_a_file_that_is_missing_is_named(files: Files, tmp_path: Path, setting: str) -> None:
    found = files.findings(**{setting: tmp_path / "none"})["certificates"]
    assert found.level == "error"
    assert found.fact == f"{setting} {tmp_path / 'none'} cannot be read: No such file or directory"
    assert found.advice.startswith("name a file that")


def test_another_certificates_key_is_said_to_be_that(files: Files) -> None:
    files.key.write_bytes(AUTHORITY.issue("other").key)
    found = files.findings()["certificates"]
    assert (found.level, found.advice.split(":")[0]) == (
        "error",
        "the key belongs to another certificate",
    )


@pytest.mark.parametrize("name", ["tls_cert", "tls_key", "client_ca"])
def test_what_is_no_pem_is_an_error(files: Files, name: str) -> None:
    wrong = files.certificate.with_name("wrong")
    wrong.write_text("-----BEGIN nothing")
    found = files.findings(**{name: wrong})["certificates"]
    assert found.level == "error"
    assert str(wrong) in found.fact
    assert found.advice.startswith("PEM files are needed")


def test_a_key_for_everybody_to_read_is_a_warning(files: Files) -> None:
    files.key.chmod(0o644)
    assert files.findings()["tls_key"].advice == f"chmod o-r {files.key}"


@pytest.mark.parametrize(
    ("expires", "level", "fact"),
    [
        (-_DAY, "error", "CN=server expired at "),
        (3.5 * _DAY, "warning", "CN=server expires in 3 days, at "),
        (29.5 * _DAY, "warning", "CN=server expires in 29 days, at "),
        (30.5 * _DAY, "ok", "CN=server expires in 30 days, at "),
    ],
)
def test_the_end_is_told_in_time(
    files: Files, expires: datetime.timedelta, level: str, fact: str
) -> None:
    files.write(AUTHORITY.issue("server", expires=expires))
    found = files.findings()["tls_cert time"]
    assert (found.level, found.fact.startswith(fact)) == (level, True), found
    assert bool(found.advice) == (level != "ok")
    assert files.openssl() == (level != "error")


def test_a_certificate_of_tomorrow_is_an_error(files: Files) -> None:
    files.write(AUTHORITY.issue("server", starts=_DAY / 2))
    found = files.findings()["tls_cert time"]
    assert (found.level, found.advice) == ("error", "set the clock, or wait")
    assert found.fact.startswith("CN=server is not valid before ")
    assert not files.openssl()


def test_a_chain_ends_with_the_first_of_its_certificates(files: Files) -> None:
    """The authority of these tests has a day left."""
    files.certificate.write_bytes(GOOD.certificate + AUTHORITY.pem)
    found = files.findings()
    assert found["tls_cert"].fact == "CN=server, CN=first, issued by itself"
    assert found["tls_cert time"].fact.startswith("CN=first expires in 0 days")


def test_a_chain_in_another_order_is_an_error(files: Files) -> None:
    files.certificate.write_bytes(GOOD.certificate + Authority("second").pem)
    found = files.findings()["tls_cert"]
    assert (found.level, found.fact) == (
        "error",
        "CN=second follows CN=server, and has not issued it",
    )
    # Of the same name, which is not enough.
    files.certificate.write_bytes(GOOD.certificate + Authority("first").pem)
    assert files.findings()["tls_cert"].level == "error"


def test_a_certificate_for_clients_alone_is_an_error(files: Files) -> None:
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    files.write(AUTHORITY.issue("server", extensions=[usage]))
    assert files.findings()["tls_cert"].level == "error"
    assert not files.openssl()


@pytest.mark.parametrize(
    ("host", "level"),
    [
        ("gpu-7.example.org", "ok"),
        ("GPU-7.Example.org", "ok"),
        ("a.wild.example.org", "ok"),
        ("a.b.wild.example.org", "warning"),
        ("wild.example.org", "warning"),
        ("10.0.0.7", "ok"),
        ("10.0.0.8", "warning"),
        ("0.0.0.0", "ok"),
        ("::", "ok"),
    ],
)
def test_the_host_is_looked_for_among_the_names(files: Files, host: str, level: str) -> None:
    hosts = [x509.DNSName(name) for name in ("gpu-7.example.org", "*.wild.example.org")]
    address = x509.IPAddress(ipaddress.ip_address("10.0.0.7"))
    files.write(AUTHORITY.issue("server", extensions=[_names(*hosts, address)]))
    found = files.findings(host=host)["tls_cert names"]
    assert found.level == level
    assert found.fact.startswith("gpu-7.example.org, *.wild.example.org, 10.0.0.7")
    if host not in ("0.0.0.0", "::"):
        flag = "-verify_ip" if host[0].isdigit() else "-verify_hostname"
        assert files.openssl(flag, host) == (level == "ok")


def test_a_certificate_without_names_is_an_error(files: Files) -> None:
    files.write(AUTHORITY.issue("localhost", extensions=[]))
    found = files.findings()["tls_cert names"]
    assert (found.level, found.advice) == ("error", "issue it again with subjectAltName")


def test_who_issues_no_certificates_is_no_authority_of_clients(files: Files) -> None:
    files.client_ca.write_bytes(AUTHORITY.pem + AUTHORITY.issue("me").certificate)
    found = files.findings(client_ca=files.client_ca)["client_ca"]
    assert (found.level, found.fact) == ("error", "CN=me is no authority")
