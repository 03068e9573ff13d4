"""What is asked: seeded prompts and output lengths, the same whoever sends them."""

import math
import random
import re
from dataclasses import dataclass
from typing import Self

_MAX_LENGTH = 1_000_000
# A factor of 22,026 from the median to the 84th percentile; far beyond it draws overflow.
_MAX_SIGMA = 10.0
_SHAREGPT = "sharegpt"
_SYNTAX = (
    "allowed: fixed:TOKENS, uniform:LOW-HIGH, lognormal:MEDIAN,SIGMA,MAX, "
    f"or {_SHAREGPT} where a workload is given"
)
_NUMBER = r"(\d+(?:\.\d+)?)"


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: log-normal, uniform where `sigma` is None.

    Attributes:
        low, high: bounds, both included. A log-normal draw above `high` is drawn again.
        median, sigma: of the log-normal, before it is rounded up to whole tokens.
    """

    low: int
    high: int
    median: float = 0.0
    sigma: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `fixed:128`, `uniform:64-256` or `lognormal:MEDIAN,SIGMA,MAX`.

        Raises:
            ValueError: it is none of them, or a number is out of range.
        """
        if match := re.fullmatch(r"fixed:(\d+)", text):
            lengths = cls(int(match[1]), int(match[1]))
        elif match := re.fullmatch(r"uniform:(\d+)-(\d+)", text):
            lengths = cls(int(match[1]), int(match[2]))
        elif match := re.fullmatch(rf"lognormal:{_NUMBER},{_NUMBER},(\d+)", text):
            lengths = cls(1, int(match[3]), float(match[1]), float(match[2]))
            # Half of all draws or more are then accepted.
            if not 0 < lengths.median <= lengths.high:
                raise ValueError(f"length is {text!r}; allowed: a median above 0 and at most MAX")
            if lengths.sigma is not None and lengths.sigma > _MAX_SIGMA:
                raise ValueError(f"length is {text!r}; allowed: a sigma of 0 to {_MAX_SIGMA:g}")
        else:
            raise ValueError(f"length is {text!r}; {_SYNTAX}")
        if not 1 <= lengths.low <= lengths.high <= _MAX_LENGTH:
            raise ValueError(f"length is {text!r}; allowed: 1 to {_MAX_LENGTH} tokens, low first")
        return lengths

    def __str__(self) -> str:
        if self.sigma is not None:
            return f"lognormal:{self.median:g},{self.sigma:g},{self.high}"
        if self.low == self.high:
            return f"fixed:{self.low}"
        return f"uniform:{self.low}-{self.high}"

    def draw(self, rng: random.Random) -> int:
        if self.sigma is None:
            return rng.randint(self.low, self.high)
        while (length := math.ceil(rng.lognormvariate(math.log(self.median), self.sigma))) > (
            self.high
        ):
            pass
        return max(self.low, length)


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        hang_up_after: the client goes away after so many tokens; None stays to the end.
    """

    index: int
    token_ids: list[int]
    max_tokens: int
    hang_up_after: int | None


@dataclass(frozen=True, slots=True)
class Workload:
    """A sequence of requests without end; each follows from `seed` and its index alone.

    Attributes:
        prompt, output: tokens of each request.
        shared_prefix: equal tokens in front of every prompt, beside those of `prompt`.
        hang_up: share of requests, 0 to 1, whose client goes away after half of the tokens.
    """

    prompt: Lengths
    output: Lengths
    shared_prefix: int = 0
    hang_up: float = 0.0
    seed: int = 0

    @classmethod
    def parse(
        cls,
        prompt: str,
        output: str,
        *,
        shared_prefix: int = 0,
        hang_up: float = 0.0,
        seed: int = 0,
    ) -> Self:
        """Lengths as `Lengths.parse` reads them, or `sharegpt`.

        Raises:
            ValueError: a field is wrong.
        """
        return cls(
            prompt=SHAREGPT_PROMPT if prompt == _SHAREGPT else Lengths.parse(prompt),
            output=SHAREGPT_OUTPUT if output == _SHAREGPT else Lengths.parse(output),
            shared_prefix=shared_prefix,
            hang_up=hang_up,
            seed=seed,
        )

    def __post_init__(self) -> None:
        if not 0 <= self.shared_prefix <= _MAX_LENGTH:
            raise ValueError(
                f"shared_prefix is {self.shared_prefix}; allowed: 0 to {_MAX_LENGTH} tokens"
            )
        if not 0 <= self.hang_up <= 1:
            raise ValueError(f"hang_up is {self.hang_up}; allowed: 0 to 1")

    def request(self, index: int, vocab_size: int) -> Request:
        rng = _rng(self.seed, "request", index)
        length, max_tokens = self.prompt.draw(rng), self.output.draw(rng)
        prefix = _rng(self.seed, "prefix").choices(range(vocab_size), k=self.shared_prefix)
        return Request(
            index,
            token_ids=prefix + rng.choices(range(vocab_size), k=length),
            max_tokens=max_tokens,
            hang_up_after=(max_tokens + 1) // 2 if rng.random() < self.hang_up else None,
        )


def _rng(*seed: object) -> random.Random:
    """Seeded by text, which gives the same numbers on every machine."""
    return random.Random("/".join(map(str, seed)))  # noqa: S311, a workload is no secret


# Means of 161 prompt and 338 output tokens, as the PagedAttention paper (arXiv 2309.06180, figure
# 11) gives for ShareGPT, if they were not cut; the spread is a choice. Cut to fit 1024 tokens.
SHAREGPT_PROMPT = Lengths.parse("lognormal:60,1.4,512")
SHAREGPT_OUTPUT = Lengths.parse("lognormal:240,0.83,512")
