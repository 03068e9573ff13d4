"""Questions about capacity."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

from protos.headroom.v1 import models_pb2 as pb

# Prompt and output tokens, and the share of all requests (1 by default).
Shape: TypeAlias = tuple[int, int] | tuple[int, int, int]


class Planning(TypedDict, total=False):
    """What to plan for instead of the served model as it is; see `PlanCapacityRequest`.

    Keys:
        num_heads, num_kv_heads, head_dim, window, sink_tokens: of every layer; window 0 is all.
        memory: bytes; the cache of the server by default.
        step_model, machine: as in the result of a sweep.
        target_concurrent, target_tokens_per_s, target_context: ask for changes that reach them.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    sink_tokens: int
    dtype: str
    kv_cache_dtype: str
    block_size: int
    memory: int
    weights_included: bool
    clients: int
    step_model: Mapping[str, Any]
    machine: Mapping[str, Any]
    target_concurrent: int
    target_tokens_per_s: float
    target_context: int


def plan_request(mix: Sequence[Shape], planning: Planning) -> pb.PlanCapacityRequest:
    fields: dict[str, Any] = dict(planning)
    for part, message, prefix in (
        ("heads", pb.PlannedHeads, ""),
        ("target", pb.CapacityTarget, "target_"),
    ):
        names = [name for name in message.DESCRIPTOR.fields_by_name if prefix + name in fields]
        if names:
            fields[part] = {name: fields.pop(prefix + name) for name in names}
    shapes = [
        pb.RequestShape(**dict(zip(("prompt", "output", "share"), shape, strict=False)))
        for shape in mix
    ]
    return pb.PlanCapacityRequest(mix=shapes, **fields)
