"""What a check found."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact.

    Attributes:
        check: what was looked at.
        advice: what to do; empty if it is as it should be.
    """

    check: str
    level: Level
    fact: str
    advice: str = ""
