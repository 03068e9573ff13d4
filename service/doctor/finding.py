"""What a check found."""

import stat
from dataclasses import dataclass
from pathlib import Path
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


def private_file(check: str, path: Path, fact: str) -> Finding:
    """Of a file that is there: whether it is for its user alone.

    Args:
        fact: what there is to say if it is.
    """
    if path.stat().st_mode & stat.S_IROTH:
        reading = "every user of this machine can read it"
        return Finding(check, "warning", reading, f"chmod o-r {path}")
    return Finding(check, "ok", fact)
