"""Why the engine refuses or loses a request. Knows no transport and no status code.

EngineError
├── InvalidRequestError      fields of the request are wrong; every one of them is named
├── EncoderModelError        the model is an encoder, which embeds and does nothing else
├── NeverFitsError           the request is larger than the whole KV cache
├── QueueFullError           the waiting queue is full, by requests or by tokens
├── EngineDrainingError      the engine finishes what it has and takes nothing new
├── EngineDeadError          the engine thread has failed; only a new engine helps
│   └── RequestLostError     it has, while it had this request
└── EngineStalledError       there is work, and no step has finished for too long
"""

from collections.abc import Sequence
from dataclasses import dataclass

# What travels with an error has to fit into the metadata of a response.
_MAX_VIOLATIONS = 20
_MAX_SHOWN = 6


class EngineError(Exception):
    """Base of everything the engine raises on purpose."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One wrong field: its name, what was given, and what is allowed."""

    field: str
    given: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.field} is {self.given}; allowed: {self.allowed}"


class InvalidRequestError(EngineError, ValueError):
    """Fields of a request are wrong."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations[:_MAX_VIOLATIONS])
        shown = [str(violation) for violation in violations[:_MAX_SHOWN]]
        if len(violations) > _MAX_SHOWN:
            shown.append(f"and {len(violations) - _MAX_SHOWN} more")
        super().__init__("; ".join(shown))


class EncoderModelError(EngineError):
    """The request needs a model that predicts the next token."""

    def __init__(self) -> None:
        super().__init__("the served model is an encoder: it embeds, it cannot generate or score")


class NeverFitsError(EngineError):
    """A request needs more KV blocks than the engine has in total."""

    def __init__(self, *, num_tokens: int, max_tokens: int) -> None:
        super().__init__(
            f"prompt and max_tokens need {num_tokens} tokens of KV cache; "
            f"this server has {max_tokens} in total"
        )


class QueueFullError(EngineError):
    """The waiting queue has reached its limit of requests or of tokens."""

    def __init__(self, *, unit: str, limit: int) -> None:
        self.unit = unit
        super().__init__(f"the queue is full: it holds at most {limit} waiting {unit}")


class EngineDrainingError(EngineError):
    """The engine is shutting down."""

    def __init__(self) -> None:
        super().__init__("the server is draining: it finishes running requests and takes no new")


class EngineDeadError(EngineError):
    """The engine thread has ended with an error."""

    def __init__(self) -> None:
        super().__init__("the engine has failed; a new one has to be started")


class RequestLostError(EngineDeadError):
    """The engine thread has ended while it had this request."""


class EngineStalledError(EngineError):
    """The engine has work but makes no progress."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the engine has work but finished no step for {seconds:.1f} s")
