"""What a sweep measures, and with what."""

from dataclasses import dataclass
from typing import Any

from loadtests.servers import Runtime
from loadtests.sweep.configurations import Configuration
from loadtests.sweep.quality import HeldOutText
from models.config import ModelConfig
from service.capacity import CapacityQuery, RequestShape, plan_capacity
from service.engine.config import EngineConfig
from service.engine.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Load:
    """`clients` streams at once, each sends `waves` requests, one after the other."""

    clients: int
    prompt: int
    output: int
    waves: int
    waiting: bool

    @property
    def name(self) -> str:
        return f"c{self.clients}-p{self.prompt}-o{self.output}"

    @property
    def num_requests(self) -> int:
        return self.clients * self.waves


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and with what.

    Attributes:
        port, http_port, metrics_port: as in the file; None is any free one.
        text: what checkpoints are measured on.
        all_cores: `engine.num_threads` is not from the file, but the cores of this machine.
    """

    name: str
    runtime: Runtime
    repeats: int
    seed: int
    port: int | None
    http_port: int | None
    metrics_port: int | None
    engine: EngineConfig
    all_cores: bool
    configurations: tuple[Configuration, ...]
    loads: tuple[Load, ...]
    text: HeldOutText

    def max_concurrent(self, model: ModelConfig, load: Load) -> int:
        """Requests of a load that the KV budget always holds at once, as the planner says."""
        assert self.engine.kv_cache_bytes is not None, "a sweep has a KV budget"
        query = CapacityQuery(
            model=model,
            memory=self.engine.kv_cache_bytes,
            weights_included=False,
            mix=(RequestShape(load.prompt, load.output),),
            engine=self.engine,
        )
        try:
            return plan_capacity(query).concurrent
        except InvalidRequestError:  # less memory than a block
            return 0

    def spec(self) -> dict[str, Any]:
        """What decides the results; two plans that agree in it measure the same."""
        quality = {} if self.text == HeldOutText() else {"quality": self.text.to_dict()}
        return {
            **quality,
            "runtime": self.runtime,
            "repeats": self.repeats,
            "seed": self.seed,
            "engine": {
                "kv_cache_bytes": self.engine.kv_cache_bytes,
                "max_num_seqs": self.engine.max_num_seqs,
                "max_num_batched_tokens": self.engine.max_num_batched_tokens,
                "block_size": self.engine.block_size,
                "num_threads": self.engine.num_threads,
            },
            "configurations": [one.to_dict() for one in self.configurations],
            "loads": [
                {
                    "name": load.name,
                    "clients": load.clients,
                    "prompt": load.prompt,
                    "output": load.output,
                    "waves": load.waves,
                    "waiting": load.waiting,
                    "requests": load.num_requests,
                }
                for load in self.loads
            ],
        }
