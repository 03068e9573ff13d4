"""How a runner is asked and how it answers; each runs in an environment of its own, so this needs
nothing but Python.

A runner gets its settings as its first argument (JSON), loads the checkpoint, and answers every
line that it reads with one line: a line of JSON on what was its standard output. What libraries
print goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

Generate = Callable[[list[list[int]], int], list[list[int]]]


@dataclass(frozen=True)
class Settings:
    """What is the same for all runners.

    Attributes:
        checkpoint: Hugging Face directory.
        prepared: what the peer's converter made of it; the same directory if there is none.
        max_num_seqs, max_model_len: what the loads need at most.
        kv_cache_bytes: memory for keys and values.
        threads: of one step.
    """

    checkpoint: Path
    prepared: Path
    max_num_seqs: int
    max_model_len: int
    kv_cache_bytes: int
    threads: int


def serve(load: Callable[[Settings], Generate], *packages: str) -> None:
    """Load, then answer until the input ends.

    Args:
        load: gives the function that continues prompts greedily by exactly so many tokens each.
        packages: whose versions are said.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    values = json.loads(sys.argv[1])
    values |= {name: Path(values[name]) for name in ("checkpoint", "prepared")}
    started = time.perf_counter()
    generate = load(Settings(**values))
    ready = {
        "seconds_to_ready": time.perf_counter() - started,
        "versions": {name: version(name) for name in packages},
    }
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        question = json.loads(line)
        started = time.perf_counter()
        outputs = generate(question["prompts"], question["num_tokens"])
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "outputs": outputs}), file=answers)
