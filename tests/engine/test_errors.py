"""What the engine says when it refuses: one tree of errors, messages that name the limit."""

import pytest

from service.engine import errors
from service.engine.errors import (
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    EngineStalledError,
    InvalidRequestError,
    NeverFitsError,
    QueueFullError,
    Violation,
)


def test_every_error_is_in_the_tree_that_the_module_shows() -> None:
    lines = [line for line in (errors.__doc__ or "").splitlines() if "── " in line]
    shown = {line.split("── ")[1].split()[0] for line in lines}
    direct = EngineError.__subclasses__()
    below = [error for parent in direct for error in parent.__subclasses__()]
    assert shown == {error.__name__ for error in (*direct, *below)}


def test_a_violation_reads_as_field_value_and_allowed() -> None:
    assert str(Violation("top_p", "2", "0 to 1")) == "top_p is 2; allowed: 0 to 1"


def test_an_invalid_request_names_all_violations() -> None:
    violations = [Violation("a", "1", "2"), Violation("b", "3", "4")]
    error = InvalidRequestError(violations)
    assert error.violations == tuple(violations)
    assert str(error) == "a is 1; allowed: 2; b is 3; allowed: 4"
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (NeverFitsError(num_tokens=65, max_tokens=64), ("65", "64")),
        (QueueFullError(unit="tokens", limit=7), ("7", "tokens")),
        (EngineDrainingError(), ("draining",)),
        (EngineDeadError(), ("failed",)),
        (EngineStalledError(12.34), ("12.3 s",)),
    ],
)
def test_messages_name_what_the_caller_can_act_on(
    error: EngineError, parts: tuple[str, ...]
) -> None:
    for part in parts:
        assert part in str(error)
