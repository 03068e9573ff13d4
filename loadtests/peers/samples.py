"""What was measured, one line each, so that an interrupted run loses nothing."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from loadtests.batches import Load


class Key(NamedTuple):
    """Which sample."""

    layers: int
    kv_heads: int
    load: str
    peer: str
    round: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One load, once.

    Attributes:
        seconds: from the first prompt to the last token.
        equal_starts: share of sequences that begin with our engine's token; None if not compared.
    """

    key: Key
    seconds: float
    equal_starts: float | None

    @property
    def tokens_per_s(self) -> float:
        load = Load.parse(self.key.load)
        return load.sequences * load.output / self.seconds


class SampleFile:
    """Samples in a file, a line each."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self._path = path
        self._samples: dict[Key, Sample] = {}
        if fresh:
            path.unlink(missing_ok=True)
        if path.exists():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off
            path.write_text(whole, encoding="utf-8")
            for line in whole.splitlines():
                values = json.loads(line)
                key = Key(*(values.pop(name) for name in Key._fields))
                self._samples[key] = Sample(key, **values)

    def __contains__(self, key: Key) -> bool:
        return key in self._samples

    def add(self, sample: Sample) -> None:
        self._samples[sample.key] = sample
        values = asdict(sample)
        line = sample.key._asdict() | {name: values[name] for name in ("seconds", "equal_starts")}
        with self._path.open("a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)

    def all(self) -> list[Sample]:
        return list(self._samples.values())
