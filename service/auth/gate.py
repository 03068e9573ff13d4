"""Admits an RPC by its bearer token, or refuses it: one place for all methods of all services."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from service.auth.tokens import Scope, TokenEntry
from service.errors import (
    ScopeMissingError,
    TokenBusyError,
    TokenExpiredError,
    TokenMissingError,
    TokenRateError,
    TokenUnknownError,
)

# Who may call a method: a token with one of these scopes, or any token at all. A method that is not
# here is closed to all.
_ANY_TOKEN: frozenset[Scope] = frozenset()
_GENERATE = frozenset({Scope.GENERATE, Scope.ADMIN})
_INSPECT = frozenset({Scope.INSPECT, Scope.ADMIN})
_SCOPES: Mapping[str, frozenset[Scope]] = {
    "headroom.v1.GenerationService/Generate": _GENERATE,
    "headroom.v1.GenerationService/Complete": _GENERATE,
    "headroom.v1.GenerationService/Score": _GENERATE,
    "headroom.v1.GenerationService/Embed": _GENERATE,
    "headroom.v1.GenerationService/Tokenize": _GENERATE,
    "headroom.v1.GenerationService/Detokenize": _GENERATE,
    "headroom.v1.AttentionService/Attend": _INSPECT,
    "headroom.v1.ModelService/GetModel": _ANY_TOKEN,
    "headroom.v1.ModelService/GetLoad": _ANY_TOKEN,
    "headroom.v1.ModelService/PlanCapacity": _ANY_TOKEN,
    "grpc.health.v1.Health/Check": _ANY_TOKEN,
    "grpc.health.v1.Health/List": _ANY_TOKEN,
    "grpc.health.v1.Health/Watch": _ANY_TOKEN,
}
_SCHEME = "bearer "


class Tokens(Protocol):
    @property
    def is_current(self) -> bool: ...
    def find(self, token: str) -> TokenEntry | None: ...


class Caller:
    """The owner of a token, while one of its RPCs is open."""

    def __init__(self, name: str, use: "_Use") -> None:
        self.name = name
        self._use = use

    def computed(self, num_tokens: int) -> None:
        """Charge tokens of prompts and answers; less than none gives them back."""
        self._use.charge(num_tokens)


class Gate:
    """Checks every RPC, and counts what the owner of each token uses.

    Args:
        tokens: those that are known.
        clock: monotonic seconds.
    """

    def __init__(self, tokens: Tokens, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens = tokens
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    @property
    def has_current_tokens(self) -> bool:
        """Whether the tokens in use are those of the file: not if that cannot be used."""
        return self._tokens.is_current

    @contextmanager
    def admit(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Iterator[Caller]:
        """Admit an RPC for as long as it is open.

        Args:
            method: full name, `headroom.v1.GenerationService/Generate`.
            metadata: the caller's.

        Raises:
            TokenMissingError, TokenUnknownError, TokenExpiredError: it does not say who calls.
            ScopeMissingError: the token does not allow the method.
            TokenBusyError, TokenRateError: the token's owner has reached a limit.
        """
        entry = self._entry(metadata)
        scopes = _SCOPES.get(method)
        if scopes is None or (scopes and not scopes.intersection(entry.scopes)):
            raise ScopeMissingError(entry.name, method, sorted(scopes or {"none"}))
        # Limits are the entry's of now; what has been used stays counted when it is replaced.
        use = self._uses.setdefault(entry.name, _Use(self._clock))
        with use.open(entry, counted=bool(scopes)):
            yield Caller(entry.name, use)

    def _entry(self, metadata: Iterable[tuple[str, str | bytes]]) -> TokenEntry:
        values = [str(value) for key, value in metadata if key == "authorization"]
        if len(values) != 1 or not values[0].lower().startswith(_SCHEME):
            raise TokenMissingError
        entry = self._tokens.find(values[0][len(_SCHEME) :].strip())
        if entry is None:
            raise TokenUnknownError
        if entry.has_expired:
            raise TokenExpiredError(entry.name)
        return entry


class _Use:
    """What the owner of a token has open, and is owed of its allowance.

    The allowance is a bucket of one minute that fills steadily. An RPC is admitted while something
    is left, and charged when it is known what it took, so that it may end below nothing.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._num_open = 0
        self._used = 0.0  # of the bucket
        self._drained = clock()

    @contextmanager
    def open(self, entry: TokenEntry, *, counted: bool) -> Iterator[None]:
        """Count an RPC while it is open; those that anybody may call are neither counted nor
        refused."""
        if not counted:
            yield
            return
        if entry.max_concurrent is not None and self._num_open >= entry.max_concurrent:
            raise TokenBusyError(entry.name, entry.max_concurrent)
        self._drain(entry.tokens_per_minute)
        if entry.tokens_per_minute is not None and self._used >= entry.tokens_per_minute:
            per_second = entry.tokens_per_minute / 60
            wait = (self._used - entry.tokens_per_minute + 1) / per_second
            raise TokenRateError(entry.name, entry.tokens_per_minute, wait)
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    def charge(self, num_tokens: int) -> None:
        self._used += num_tokens

    def _drain(self, per_minute: int | None) -> None:
        now = self._clock()
        if per_minute is None:
            self._used = 0.0
        else:
            self._used = max(0.0, self._used - (now - self._drained) * per_minute / 60)
        self._drained = now
