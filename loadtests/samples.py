"""One line per request: what a client saw, exactly."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, cast


@dataclass(frozen=True, slots=True)
class Sample:
    """One request that ended. Times are in seconds and count from `start`.

    Attributes:
        index: of the request in its workload.
        user: who sent it.
        start: when it was sent or, in an open loop, when it was due; since 1970.
        delay: from then until it was sent.
        ttft: until the first token; None without one.
        gaps: from each message with tokens to the next.
        e2e: until the stream ended.
        output_tokens: that arrived.
        finish_reason: in lower case; `cancelled` after the client's own hang-up, None if the
            request failed.
        code: gRPC status.
        message: of the status, if the request failed.
        retry_after: seconds after which the server asks to try again, if it does.
    """

    index: int
    user: int
    start: float
    delay: float
    ttft: float | None
    gaps: list[float]
    e2e: float
    prompt_tokens: int
    output_tokens: int
    finish_reason: str | None
    code: str
    message: str | None
    retry_after: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def open_samples(path: Path) -> TextIO:
    """A file for `write_sample`; gzip JSON lines.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        return cast("TextIO", gzip.open(path, "wt", encoding="utf-8", compresslevel=1))
    except OSError as error:
        raise ValueError(
            f"samples is '{path}': {error.strerror}; allowed: a file that can be written"
        ) from None


def write_sample(file: TextIO, sample: Sample) -> None:
    file.write(json.dumps(sample.to_dict(), separators=(",", ":")) + "\n")


def read_samples(path: Path) -> Iterator[Sample]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield Sample(**json.loads(line))
