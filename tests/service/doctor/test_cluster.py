"""The doctor looks at a running Ray cluster, and at how this machine would speak to it."""

import socket
from pathlib import Path

import pytest

from service.config import ServiceConfig
from service.doctor.checks import examine
from service.doctor.cluster import examine_cluster
from service.doctor.finding import Finding
from tests.certificates import Authority
from tests.service.runtimes.test_ray_address import ray_like

AUTHORITY = Authority("nodes")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a user without Ray's own file of a token."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def _token(directory: Path, text: str = "secret") -> dict[str, str]:
    path = directory / "ray.token"
    path.touch(mode=0o600)
    path.write_text(text)
    return {"RAY_AUTH_TOKEN_PATH": str(path)}


def _tls(directory: Path) -> dict[str, str]:
    """What a node with TLS is started with."""
    certificate, key, ca = (directory / name for name in ("node.crt", "node.key", "ca.crt"))
    AUTHORITY.issue("node").write(certificate, key)
    key.chmod(0o600)
    ca.write_bytes(AUTHORITY.pem)
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(certificate),
        "RAY_TLS_SERVER_KEY": str(key),
        "RAY_TLS_CA_CERT": str(ca),
    }


def _findings(environment: dict[str, str], *, tls: bool) -> dict[str, Finding]:
    with ray_like(tls=tls) as address:
        return {one.check: one for one in examine_cluster(address, environment)}


def test_a_cluster_is_among_the_checks_and_one_of_our_own_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    checks = {one.check: one for one in examine(ServiceConfig(ray_address=address), {})}
    assert checks["ray_address"].level == "error"
    assert checks["ray_address"].fact == f"{address}: [Errno 111] Connection refused"
    assert "HOST:PORT" in checks["ray_address"].advice
    own = {one.check for one in examine(ServiceConfig(), {})}
    assert not {"ray_address", "RAY_USE_TLS", "RAY_AUTH_TOKEN_PATH"} & own


def test_what_fits_is_well(tmp_path: Path) -> None:
    for tls, environment in ((False, _token(tmp_path)), (True, _token(tmp_path) | _tls(tmp_path))):
        found = _findings(environment, tls=tls)
        assert {one.level for one in found.values()} == {"ok"}, found
        assert found["ray_address"].fact.endswith("answers in TLS" if tls else "in the clear")


def test_tls_on_one_side_alone_is_named(tmp_path: Path) -> None:
    """Ray waits for minutes and says nothing."""
    token, tls = _token(tmp_path), _tls(tmp_path)
    found = _findings(token, tls=True)
    assert (found["RAY_USE_TLS"].level, found["RAY_USE_TLS"].fact) == (
        "error",
        "not set, and the cluster speaks TLS",
    )
    assert all(name in found["RAY_USE_TLS"].advice for name in tls)
    found = _findings(token | tls, tls=False)
    assert (found["RAY_USE_TLS"].level, found["RAY_USE_TLS"].fact) == (
        "error",
        "1, and the cluster speaks in the clear",
    )
    assert "unset it" in found["RAY_USE_TLS"].advice


def test_certificates_that_nothing_uses_are_named(tmp_path: Path) -> None:
    unused = {name: value for name, value in _tls(tmp_path).items() if name != "RAY_USE_TLS"}
    found = (_findings(unused, tls=False))["RAY_USE_TLS"]
    assert (found.level, found.fact) == (
        "warning",
        "not set: nothing reads RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY, RAY_TLS_CA_CERT",
    )


def test_certificates_of_this_machine(tmp_path: Path) -> None:
    tls = _tls(tmp_path)
    for name in tls.keys() - {"RAY_USE_TLS"}:
        found = _findings({key: tls[key] for key in tls if key != name}, tls=True)
        assert (found[name].level, found[name].fact) == ("error", "not set"), name
    Path(tls["RAY_TLS_SERVER_KEY"]).chmod(0o604)
    found = _findings(tls, tls=True)
    assert found["RAY_TLS_SERVER_KEY"].level == "warning"
    Path(tls["RAY_TLS_SERVER_KEY"]).write_bytes(AUTHORITY.issue("other").key)
    found = _findings(tls, tls=True)
    assert found["RAY_TLS_SERVER_CERT"].level == "error"
    assert "KEY_VALUES_MISMATCH" in found["RAY_TLS_SERVER_CERT"].fact


@pytest.mark.parametrize("ray_address", [None, "127.0.0.1:1"])
def test_processes_without_a_token_are_named(ray_address: str | None) -> None:
    """An own cluster starts with it; a node of another is refused."""
    config = ServiceConfig(ray_address=ray_address)
    found = {one.check: one for one in examine(config, {"RAY_AUTH_MODE": "disabled"})}
    assert found["RAY_AUTH_MODE"].fact == "disabled"
    assert found["RAY_AUTH_MODE"].level == ("error" if ray_address else "warning")
    for environment in ({}, {"RAY_AUTH_MODE": "token"}):
        assert "RAY_AUTH_MODE" not in {one.check for one in examine(config, environment)}


def test_the_token_of_the_cluster_is_where_ray_looks_for_it(tmp_path: Path, home: Path) -> None:
    def token(environment: dict[str, str]) -> Finding:
        return (_findings(environment, tls=False))["RAY_AUTH_TOKEN_PATH"]

    default = home / ".ray" / "auth_token"
    found = token({})
    assert (found.level, found.fact) == (
        "error",
        f"{default} cannot be read: No such file or directory",
    )
    assert "ray start" in found.advice
    empty = _token(tmp_path, " \n")
    assert (token(empty)).level == "error"
    assert (token(empty | {"RAY_AUTH_TOKEN": "secret"})).level == "ok"
    named = _token(tmp_path)
    assert token(named) == Finding("RAY_AUTH_TOKEN_PATH", "ok", named["RAY_AUTH_TOKEN_PATH"])
    Path(named["RAY_AUTH_TOKEN_PATH"]).chmod(0o604)
    assert (token(named)).level == "warning"
    default.parent.mkdir(parents=True)
    default.touch(mode=0o600)
    default.write_text("secret")
    assert token({}) == Finding("RAY_AUTH_TOKEN_PATH", "ok", str(default))
