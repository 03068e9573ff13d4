"""The fields of a sweep file: head configurations, loads, and what every engine is given."""

import contextlib
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from models.config import MAX_WINDOW, DTypeName

# Bounds of what one file can ask for: a point takes seconds, a configuration memory.
MAX_CONFIGURATIONS = 32
MAX_POINTS = 4096
_NAME = r"^[a-zA-Z0-9_-]{1,64}$"
_BYTE_SIZE = TypeAdapter(ByteSize)
_Item = TypeVar("_Item")

Several = Annotated[
    list[_Item],
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    Field(min_length=1, max_length=MAX_CONFIGURATIONS),
]


def _num_bytes(value: object) -> object:
    if isinstance(value, str):
        with contextlib.suppress(ValidationError):
            return int(_BYTE_SIZE.validate_python(value))
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    raise PydanticCustomError("num_bytes", "bytes, such as 512MiB")


NumBytes = Annotated[int, BeforeValidator(_num_bytes), Field(ge=1)]
Name = Annotated[str, Field(pattern=_NAME)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Tokens = Annotated[int, Field(ge=1, le=131_072)]
Port = Annotated[int, Field(ge=1024, le=65_000)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Shape(_Section):
    """Llama-style models of random weights; lists mean every combination of their values.

    Attributes:
        name: of the configuration; by default its heads, such as `h12kv4d64`.
        kv_heads: by default as many as `heads`, which is multi-head attention.
        head_dim: by default `hidden / heads`.
        window: tokens that every head sees; null is all.
        same_parameters_as: name of a configuration; `intermediate` is widened until there are as
            many parameters (Shazeer 2019 compares multi-query attention in this way).
    """

    name: Name | None = None
    layers: Annotated[int, Field(ge=1, le=256)] = 12
    hidden: Width = 768
    intermediate: Width = 2048
    vocab: Annotated[int, Field(ge=256, le=262_144)] = 32_000
    dtype: DTypeName = "bfloat16"
    heads: Several[Width]
    kv_heads: Several[Width] | None = None
    head_dim: Several[Width] | None = None
    window: Several[Annotated[int, Field(ge=1, le=MAX_WINDOW)] | None] = [None]
    same_parameters_as: Name | None = None

    @property
    def num_combinations(self) -> int:
        """How many models the lists mean, those that cannot work included."""
        lists = (self.heads, self.kv_heads, self.head_dim, self.window)
        return math.prod(len(values) for values in lists if values is not None)


class Checkpoint(_Section):
    """A Hugging Face directory; a relative one is looked for from where the command runs.

    Attributes:
        checkpoint: the directory, or `demo`, the bundled one.
    """

    name: Name
    checkpoint: Annotated[Path, Field(strict=False)]
    num_combinations: ClassVar[int] = 1


class LoadSection(_Section):
    """Closed-loop clients; lists mean every combination of their values.

    Attributes:
        waves: requests that each client sends, one after the other.
        waiting: more clients than the KV cache holds sequences are meant, the others wait;
            without it such a load is refused.
    """

    clients: Several[Annotated[int, Field(ge=1, le=1024)]]
    prompt: Several[Tokens]
    output: Annotated[int, Field(ge=2, le=32_768)]
    waves: Annotated[int, Field(ge=1, le=1000)] = 2
    waiting: bool = False

    @property
    def num_combinations(self) -> int:
        """How many loads the lists mean."""
        return len(self.clients) * len(self.prompt)


class EngineSection(_Section):
    """What every engine gets, the same for all configurations.

    Attributes:
        kv_cache_bytes: the KV budget, as a number or with a unit, such as 512MiB.
        max_num_seqs: by default as many as the largest load has clients.
        max_num_batched_tokens: by default 512, or `max_num_seqs` if that is more.
        num_threads: by default all cores; only one server works at a time.
    """

    kv_cache_bytes: NumBytes
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] | None = None
    max_num_batched_tokens: Annotated[int, Field(ge=1, le=65_536)] | None = None
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None


class QualitySection(_Section):
    """What checkpoints are measured on, all on the same text.

    Attributes:
        text: a UTF-8 file; by default held-out documents of Python's standard library.
        bytes: so much of it, from its beginning, as a number or with a unit; by default all.
    """

    text: Annotated[Path, Field(strict=False)] | None = None
    bytes: NumBytes | None = None


class SweepFile(_Section):
    """A whole file; its entries are validated one by one, so that all mistakes are found.

    Attributes:
        name: of the folder of results; by default the name of the file.
        runtime: `ray` serves all configurations side by side from one server, `standalone` starts
            a process for each.
        repeats: how often every point is measured; repeats are interleaved.
        port, http_port, metrics_port: the first of each kind; by default free ones.
    """

    name: Name | None = None
    runtime: Literal["ray", "standalone"] = "ray"
    repeats: Annotated[int, Field(ge=1, le=100)] = 3
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    port: Port | None = None
    http_port: Port | None = None
    metrics_port: Port | None = None
    engine: object
    quality: object = None
    configurations: Annotated[list[object], Field(min_length=1, max_length=MAX_CONFIGURATIONS)]
    loads: Annotated[list[object], Field(min_length=1, max_length=MAX_POINTS)]
