"""The file of bearer tokens: digests, names, scopes and limits. It holds no token."""

import enum
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import structlog
import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from service.files import version_of


class Scope(enum.StrEnum):
    """What a token allows."""

    GENERATE = enum.auto()
    INSPECT = enum.auto()
    ADMIN = enum.auto()


_RANDOM_BYTES = 32
# How often the file is looked at, at most.
_LOOK_SECONDS = 1.0
_QUOTED = re.compile(r"('..?')|['\"].*", re.DOTALL)

log = structlog.get_logger()


class TokenFileError(ValueError):
    """A token file cannot be used; the message has one line per mistake."""


class TokenEntry(BaseModel):
    """One token.

    Attributes:
        name: of its owner, for logs.
        sha256: digest of the token, in hexadecimal.
        scopes: what it allows, `admin` everything; none allows only what every token does.
        expires: from when on it is refused; None is never.
        max_concurrent: RPCs that may be open at once, in each replica; None is any number.
        tokens_per_minute: of prompts and answers together, in each replica; None is any number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.@-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...]
    expires: AwareDatetime | None = None
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None

    @property
    def has_expired(self) -> bool:
        return self.expires is not None and self.expires <= datetime.now(UTC)


_FILE = TypeAdapter(Annotated[list[TokenEntry], Field(min_length=1)])


def new_token() -> str:
    """A random token; its entropy makes a plain digest of it safe to keep."""
    return f"hr_{secrets.token_urlsafe(_RANDOM_BYTES)}"


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def read_tokens(path: Path) -> tuple[TokenEntry, ...]:
    """The entries of a file, a YAML list.

    Raises:
        TokenFileError: it cannot be read, or an entry is wrong or there twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenFileError(f"{path} cannot be read: {error}") from error
    # Causes are not kept: they quote the file, where somebody may have written a token, and Ray
    # logs what a replica's constructor raises with all of its causes.
    try:
        content = yaml.safe_load(text)
    except Exception as error:  # also of values, as a day that does not exist
        raise TokenFileError(f"{path} is no YAML: {_mistake(error)}") from None
    try:
        entries = _FILE.validate_python(content or [])
    except ValidationError as error:
        lines = [f"{path}: {_violation(problem)}" for problem in error.errors()]
        raise TokenFileError("\n".join(lines)) from None
    for field in ("name", "sha256"):
        values = [getattr(entry, field) for entry in entries]
        for value in values:
            if values.count(value) > 1:
                raise TokenFileError(f"{path}: {field} {value!r} is there twice; allowed: once")
    return tuple(entries)


def _mistake(error: Exception) -> str:
    """Where a text is no YAML, without what is there."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return "a forbidden character, or a value that cannot be, such as February 30"
    # A character or two may be quoted; what is longer comes from the file, as names of aliases.
    problem = _QUOTED.sub(lambda quoted: quoted[1] or "...", error.problem or "")
    return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {problem}"


def _violation(problem: ErrorDetails) -> str:
    """What is wrong with an entry, without what was given: a field's name may be a token too."""
    where, message = problem["loc"], problem["msg"]
    if problem["type"] == "extra_forbidden":
        where, known = where[:-1], ", ".join(TokenEntry.model_fields)
        message = f"unknown field; allowed: {known}"
    return f"{'.'.join(map(str, where)) or 'the file'}: {message}"


class TokenStore:
    """The tokens of a file, which is read again when it changes.

    A changed file that cannot be used is reported in the log, and the tokens before it stay.

    Args:
        path: of the file.
        own: entries beside those of the file.
        clock: monotonic seconds.

    Raises:
        TokenFileError: see `read_tokens`.
    """

    def __init__(
        self,
        path: Path,
        own: Sequence[TokenEntry] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._own = tuple(own)
        self._clock = clock
        self._looked = clock()
        self._seen = version_of([path])
        self._entries = (*self._own, *read_tokens(path))
        self._is_current = True

    @property
    def is_current(self) -> bool:
        """Whether the tokens in use are those of the file as it is."""
        self._follow()
        return self._is_current

    def find(self, token: str) -> TokenEntry | None:
        """The entry of a token, in a time that says nothing about it; None if there is none."""
        self._follow()
        digest = digest_of(token)
        found = [e for e in self._entries if hmac.compare_digest(e.sha256, digest)]
        return found[0] if found else None

    def _follow(self) -> None:
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        version = version_of([self._path])
        if version == self._seen:
            return
        self._seen = version
        try:
            entries = read_tokens(self._path)
        except TokenFileError as error:
            self._is_current = False
            log.error("token file not used", error=str(error))
            return
        self._entries = (*self._own, *entries)
        self._is_current = True
        log.info("token file read", tokens=len(entries))
