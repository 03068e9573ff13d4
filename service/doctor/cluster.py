"""A running Ray cluster: whether it is there, and whether this machine's processes fit it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from service.certificates import CertificateError, CertificateFiles
from service.doctor.finding import Finding, private_file
from service.runtimes.ray_address import speaks_tls, uses_tls

_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
_AS_NODES = "as in the environment of `ray start` on the nodes"


def examine_cluster(address: str, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Findings for the cluster at `ray_address`.

    Args:
        environment: variables that `headroom serve` would be started with.
    """
    try:
        tls = speaks_tls(address)
    except (OSError, OverflowError) as error:
        advice = "start the cluster, or name HOST:PORT of its first node"
        yield Finding("ray_address", "error", f"{address}: {error}", advice)
        tls = uses_tls(environment)  # there is nothing to compare with
    else:
        yield Finding("ray_address", "ok", f"{address} answers in {'TLS' if tls else 'the clear'}")
    yield from _tls(environment, cluster=tls)
    yield _token(environment)


def _tls(environment: Mapping[str, str], *, cluster: bool) -> Iterator[Finding]:
    """Ray itself waits for minutes where only one side speaks TLS, and says nothing."""
    missing = [name for name in _FILES if not environment.get(name)]
    if not uses_tls(environment):
        advice = f"set RAY_USE_TLS=1 and {', '.join(_FILES)}, {_AS_NODES}"
        given = [name for name in _FILES if name not in missing]
        if cluster:
            yield Finding("RAY_USE_TLS", "error", "not set, and the cluster speaks TLS", advice)
        elif given:
            fact = f"not set: nothing reads {', '.join(given)}"
            yield Finding("RAY_USE_TLS", "warning", fact, advice)
        return
    if not cluster:
        fact = f"{environment['RAY_USE_TLS']}, and the cluster speaks in the clear"
        yield Finding("RAY_USE_TLS", "error", fact, "unset it, or start the nodes with it")
    for name in missing:
        yield Finding(name, "error", "not set", f"name the file, {_AS_NODES}")
    if missing:
        return
    certificate, key, ca = (Path(environment[name]) for name in _FILES)
    try:
        CertificateFiles(certificate, key, ca)
    except CertificateError as error:
        advice = "name PEM files: this machine's certificate, its key, and its authority"
        yield Finding("RAY_TLS_SERVER_CERT", "error", str(error), advice)
        return
    yield private_file("RAY_TLS_SERVER_KEY", key, "belongs to RAY_TLS_SERVER_CERT")


def _token(environment: Mapping[str, str]) -> Finding:
    """Where Ray looks for the token of the cluster, in its order."""
    check = "RAY_AUTH_TOKEN_PATH"
    if environment.get("RAY_AUTH_TOKEN"):
        return Finding(check, "ok", "not needed: RAY_AUTH_TOKEN is set")
    named = environment.get(check)
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    advice = f"name the file of the cluster's token, {_AS_NODES}"
    try:
        is_empty = not path.read_bytes().strip()
    except OSError as error:
        return Finding(check, "error", f"{path} cannot be read: {error.strerror}", advice)
    if is_empty:
        return Finding(check, "error", f"{path} is empty", advice)
    return private_file(check, path, str(path))
