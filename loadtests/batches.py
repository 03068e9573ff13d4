"""Loads of sequences that start together, as they are written on a command line."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """Sequences that start together."""

    sequences: int
    prompt: int
    output: int

    @classmethod
    def parse(cls, text: str) -> "Load":
        """Raises ValueError: it is not SEQUENCES x PROMPT + OUTPUT."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", text.strip())
        if match is None:
            raise ValueError(f"loads has {text!r}; allowed: as 8x128+128")
        return cls(*map(int, match.groups()))

    @property
    def text(self) -> str:
        return f"{self.sequences}x{self.prompt}+{self.output}"
