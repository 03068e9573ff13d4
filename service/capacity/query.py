"""What a capacity plan is asked for, and what may be asked."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from models.config import ModelConfig
from service.capacity.residency import RequestShape
from service.engine.config import EngineConfig
from service.engine.errors import Violation
from service.engine.support import max_model_len

MAX_SHAPES = 16
MAX_SHARE = 1_000_000
MAX_MEMORY = 2**50
MAX_CLIENTS = 1_000_000
MAX_BLOCK_SIZE = 4096
# Query heads of a layer, and the width of one.
MAX_HEADS = 512
MAX_HEAD_DIM = 4096
# Every output token is a step of the scheduler that is followed.
MAX_OUTPUT_TOKENS = 32_768


@dataclass(frozen=True, slots=True)
class CapacityQuery:
    """What a plan is asked for.

    Attributes:
        model: a decoder, with the type that weights and cache have.
        memory: bytes.
        weights_included: the weights come out of this memory too.
        mix: the requests.
        engine: limits of the engine, for this model; its memory settings are not read.
        clients: requests at once; None is as many as the memory always holds.
    """

    model: ModelConfig
    memory: int
    weights_included: bool
    mix: tuple[RequestShape, ...]
    engine: EngineConfig
    clients: int | None = None

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens of one request."""
        return max_model_len(self.engine, self.model)


def with_heads(model: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """A model with other fields of `HeadConfig` in every layer.

    What has no size in the cache but may not fit other heads is left out: rotation, position
    biases, temperatures.

    Raises:
        ConfigError: heads cannot have these fields.
    """
    layers = tuple(
        dataclasses.replace(heads, rope=None, alibi=None, temperature=None, **changes)
        for heads in model.layers
    )
    return model.replace(layers=layers)


def query_violations(query: CapacityQuery) -> Iterator[Violation]:
    """What is wrong with a query, whatever the size of the model."""
    if not 1 <= query.engine.block_size <= MAX_BLOCK_SIZE:
        yield Violation("block_size", str(query.engine.block_size), f"1 to {MAX_BLOCK_SIZE}")
    if not 1 <= query.memory <= MAX_MEMORY:
        yield Violation("memory", str(query.memory), f"1 to {MAX_MEMORY} bytes")
    if query.clients is not None and not 1 <= query.clients <= MAX_CLIENTS:
        yield Violation("clients", str(query.clients), f"1 to {MAX_CLIENTS}")
    if not 1 <= len(query.mix) <= MAX_SHAPES:
        yield Violation("mix", f"{len(query.mix)} shapes", f"1 to {MAX_SHAPES}")
    for index, shape in enumerate(query.mix[:MAX_SHAPES]):
        yield from _shape_violations(f"mix[{index}]", shape, query.max_model_len)
    output = sum(shape.output for shape in query.mix[:MAX_SHAPES])
    if output > MAX_OUTPUT_TOKENS:
        yield Violation("mix", f"{output} output tokens", f"at most {MAX_OUTPUT_TOKENS} in all")


def _shape_violations(field: str, shape: RequestShape, longest: int) -> Iterator[Violation]:
    if not 1 <= shape.prompt <= longest - 2:
        yield Violation(f"{field}.prompt", str(shape.prompt), f"1 to {longest - 2} tokens")
    elif not 2 <= shape.output <= longest - shape.prompt:
        yield Violation(
            f"{field}.output", str(shape.output), f"2 to {longest - shape.prompt} tokens"
        )
    if not 1 <= shape.share <= MAX_SHARE:
        yield Violation(f"{field}.share", str(shape.share), f"1 to {MAX_SHARE}")
