"""Token files: what they may say, and that they are followed without a restart."""

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from service.auth.tokens import (
    Scope,
    TokenEntry,
    TokenFileError,
    TokenStore,
    digest_of,
    new_token,
    read_tokens,
)
from service.cli import app


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, *entries: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(list(entries)))
    return path


def entry(name: str, token: str, **more: object) -> dict[str, object]:
    return {"name": name, "sha256": digest_of(token), "scopes": ["generate"], **more}


def test_a_token_is_found_by_its_digest_only(tmp_path: Path) -> None:
    store = TokenStore(write(tmp_path / "t.yaml", entry("a", "one"), entry("b", "two")))
    found = store.find("two")
    assert found is not None
    assert (found.name, found.scopes) == ("b", (Scope.GENERATE,))
    assert store.find(digest_of("two")) is None
    assert store.find("") is None


def test_tokens_are_long_and_never_the_same() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(token.startswith("hr_") and len(token) == 46 for token in tokens)


SECRET = "hr_do-not-print-me"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "at least 1 item"),
        ("- [", "is no YAML: line 1, column 4: expected the node content, but found ..."),
        (f"- name: a\n  sha256: {SECRET}: x", "line 2, column 29: mapping values are not allowed"),
        ("- {name: a", "line 1, column 11: expected ',' or '}', but got ..."),
        (f"- {{name: a, sha256: *{SECRET}}}", "line 1, column 21: found undefined alias ..."),
        (f"- {{name: a, sha256: !!int {SECRET}}}", "is no YAML: "),
        ("- {name: a, expires: 2027-02-30}", "is no YAML: "),
        ("tokens: []", "valid list"),
        ("- {name: a, sha256: ab, scopes: []}", "0.sha256: String should match"),
        (f"- {{name: a, sha256: {SECRET}, scopes: []}}", "0.sha256: String should match"),
        (f"- {{name: a, sha256: {'d' * 64}, scopes: [root]}}", "0.scopes.0: Input should be"),
        (f"- {{name: 'a b', sha256: {'d' * 64}, scopes: []}}", "0.name: String should match"),
        (f"- {{name: a, sha256: {'d' * 64}}}", "0.scopes: Field required"),
        (
            f"- {{name: a, sha256: {'d' * 64}, scopes: [], {SECRET}: 1}}",
            "0: unknown field; allowed: name, sha256, scopes, expires, max_concurrent, ",
        ),
        (
            f"- {{name: a, sha256: {'d' * 64}, scopes: [], expires: 2027-01-01T00:00:00}}",
            "0.expires: Input should have timezone",
        ),
        (f"- {{name: a, sha256: {'d' * 64}, scopes: [], max_concurrent: 0}}", "0.max_concurrent"),
        (
            f"- {{name: a, sha256: {'a' * 64}, scopes: []}}\n"
            f"- {{name: a, sha256: {'b' * 64}, scopes: []}}",
            "name 'a' is there twice",
        ),
        (
            f"- {{name: a, sha256: {'c' * 64}, scopes: []}}\n"
            f"- {{name: b, sha256: {'c' * 64}, scopes: []}}",
            "is there twice",
        ),
    ],
)
def test_a_wrong_file_is_refused_without_its_contents(
    text: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(TokenFileError) as caught:
        read_tokens(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    # Ray writes what a replica's constructor raises to its log, with all causes.
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenFileError, match="No such file"):
        read_tokens(tmp_path / "none.yaml")


def _rewrite(path: Path, text: str) -> None:
    path.write_text(text)


def _replace(path: Path, text: str) -> None:
    other = path.with_suffix(".new")
    other.write_text(text)
    other.replace(path)


@pytest.mark.parametrize("change", [_rewrite, _replace])
@pytest.mark.parametrize("unusable", ["- {broken", "- {expires: 2027-02-30}"])
def test_a_changed_file_is_read_again(
    change: Callable[[Path, str], None],
    unusable: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    path = write(tmp_path / "t.yaml", entry("old", "one"))
    own = TokenEntry(name="own", sha256=digest_of("mine"), scopes=())
    store = TokenStore(path, [own], clock=clock)
    change(path, yaml.safe_dump([entry("new", "two"), entry("newer", "three")]))
    assert store.find("one") is not None, "it is looked at once a second"
    clock.now += 1
    assert store.find("one") is None
    assert store.find("two") is not None
    assert store.find("mine") is own
    change(path, unusable)
    clock.now += 1
    assert store.find("two") is not None, "what cannot be used changes nothing"
    assert not store.is_current
    assert "token file not used" in capsys.readouterr().err
    path.unlink()
    clock.now += 1
    assert store.find("two") is not None
    change(path, yaml.safe_dump([entry("last", "four")]))
    clock.now += 1
    assert store.find("two") is None
    assert store.find("four") is not None
    assert store.is_current


def test_the_command_makes_an_entry_that_admits_its_token(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    secrets: list[str] = []
    for arguments in (
        ["alice"],
        ["bob", "--scope", "inspect", "--scope", "admin", "--days", "1", "--max-concurrent", "3"],
    ):
        result = CliRunner().invoke(app, ["token", *arguments])
        assert result.exit_code == 0, result.output
        secrets.append(result.stderr.strip())
        with path.open("a") as file:
            file.write(result.stdout)
    store = TokenStore(path)
    alice, bob = (store.find(secret) for secret in secrets)
    assert alice is not None
    assert bob is not None
    assert (alice.name, alice.scopes, alice.expires) == ("alice", (Scope.GENERATE,), None)
    assert (bob.scopes, bob.max_concurrent) == ((Scope.INSPECT, Scope.ADMIN), 3)
    assert bob.expires is not None
    assert not bob.has_expired
    assert not any(secret in path.read_text() for secret in secrets)


@pytest.mark.parametrize("arguments", [["a b"], ["a", "--scope", "root"], ["a", "--days", "-1"]])
def test_bad_usage_makes_no_token(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["token", *arguments])
    assert result.exit_code == 2
    assert "hr_" not in result.output
