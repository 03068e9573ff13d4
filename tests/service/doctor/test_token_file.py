"""The doctor reads the token file as the server does."""

from pathlib import Path

import pytest
import yaml

from service.auth.tokens import digest_of
from service.config import ServiceConfig
from service.doctor import Finding
from service.doctor.token_file import examine_tokens
from tests.service.doctor.test_checks import findings

_PAST, _FUTURE = "2020-01-01T00:00:00Z", "2999-01-01T00:00:00Z"


def _write(path: Path, **expiries: str | None) -> Path:
    """A token for each name."""
    entries: list[dict[str, object]] = [
        {"name": name, "sha256": digest_of(name), "scopes": [], "expires": expires}
        for name, expires in expiries.items()
    ]
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(entries))
    return path


def _findings(path: Path) -> dict[str, Finding]:
    return {one.check: one for one in examine_tokens(ServiceConfig(tokens=path))}


def test_without_a_file_nothing_is_said() -> None:
    assert list(examine_tokens(ServiceConfig())) == []


def test_a_good_file_is_among_the_checks(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.yaml", alice=None, bob=_FUTURE)
    found = findings(tokens=path)
    assert found["tokens"] == Finding("tokens", "ok", f"2 in {path}")
    assert found["tokens time"] == Finding("tokens time", "ok", "none has expired")


@pytest.mark.parametrize("text", [None, "- {broken", "- {name: a, sha256: b, scopes: []}"])
def test_a_file_that_serve_would_refuse_is_an_error(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    if text is not None:
        path.write_text(text)
    (found,) = examine_tokens(ServiceConfig(tokens=path))
    assert (found.check, found.level) == ("tokens", "error")
    assert str(path) in found.fact
    assert "headroom token" in found.advice


def test_expired_entries_are_named(tmp_path: Path) -> None:
    found = _findings(_write(tmp_path / "t.yaml", alice=_PAST, bob=_FUTURE, carol=_PAST))
    assert found["tokens"].level == "ok"
    assert (found["tokens time"].level, found["tokens time"].fact) == (
        "warning",
        "expired: alice, carol",
    )
    assert "remove" in found["tokens time"].advice


def test_a_file_that_everybody_can_read_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.yaml", alice=None)
    path.chmod(0o604)
    found = _findings(path)["tokens"]
    assert (found.level, found.advice) == ("warning", f"chmod o-r {path}")
