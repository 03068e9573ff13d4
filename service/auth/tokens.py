"""The file of bearer tokens: digests, names, scopes and limits. It holds no token."""

import enum
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import structlog
import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from service.files import version_of


class Scope(enum.StrEnum):
    """What a token allows."""

    GENERATE = enum.auto()
    INSPECT = enum.auto()
    ADMIN = enum.auto()


_RANDOM_BYTES = 32
# How often the file is looked at, at most.
_LOOK_SECONDS = 1.0

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
    try:
        entries = _FILE.validate_python(yaml.safe_load(text) or [])
    except yaml.YAMLError as error:
        raise TokenFileError(f"{path} is no YAML: {error}") from error
    except ValidationError as error:
        # Not what was given: somebody may have written a token where its digest belongs.
        lines = [
            f"{path}: {'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise TokenFileError("\n".join(lines)) from error
    for field in ("name", "sha256"):
        values = [getattr(entry, field) for entry in entries]
        for value in values:
            if values.count(value) > 1:
                raise TokenFileError(f"{path}: {field} {value!r} is there twice; allowed: once")
    return tuple(entries)


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
