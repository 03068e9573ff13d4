"""Questions about capacity, from the wire and back. Every field is checked, all of them at once."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from models.config import DTypeName, KVCacheDType, ModelConfig
from models.errors import ConfigError
from protos.headroom.v1 import models_pb2 as pb
from service.capacity import (
    CapacityPlan,
    CapacityQuery,
    Change,
    MachineLimits,
    RequestShape,
    StepModel,
    StepTime,
    Target,
    find_changes,
    plan_capacity,
)
from service.capacity.changes import target_violations
from service.capacity.query import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_OUTPUT_TOKENS,
    query_violations,
    with_heads,
)
from service.engine.config import EngineConfig
from service.engine.errors import EncoderModelError, InvalidRequestError, Violation

_MAX_SHOWN = 32
# Of a question to a server, which computes streams beside the answer.
MAX_SERVED_OUTPUT_TOKENS = 2048
_MOST = {"num_heads": MAX_HEADS, "num_kv_heads": MAX_HEADS, "head_dim": MAX_HEAD_DIM}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PlanningCall:
    """A question, and what it is to be answered from."""

    query: CapacityQuery
    target: Target | None = None
    step_model: StepModel | None = None
    machine: MachineLimits | None = None

    def answer(self) -> pb.PlanCapacityResponse:
        """Compute the answer; long requests take seconds.

        Raises:
            InvalidRequestError: names every wrong field.
        """
        plan = plan_capacity(self.query, self.step_model, self.machine)
        if self.target is None:
            return pb.PlanCapacityResponse(plan=_plan(plan))
        changes = find_changes(self.query, self.target, self.step_model, self.machine)
        return pb.PlanCapacityResponse(
            plan=_plan(plan),
            changes=map(_change, changes),
            reaches=self.target.is_reached(plan),
        )


def planning_call(
    request: pb.PlanCapacityRequest,
    served: ModelConfig,
    limits: EngineConfig,
    cache_bytes: int,
    *,
    max_output_tokens: int = MAX_OUTPUT_TOKENS,
) -> PlanningCall:
    """Check a question about a model or a variant of it.

    Args:
        served: with the type that it computes in.
        limits: of its engine.
        cache_bytes: the memory to plan for if the request names none.
        max_output_tokens: of all shapes of the mix; each takes time to follow.

    Raises:
        InvalidRequestError: names every wrong field.
        EncoderModelError: the model keeps no cache.
    """
    if not served.is_causal:
        raise EncoderModelError
    violations: list[Violation] = []
    if request.HasField("block_size"):
        if request.block_size:
            limits = dataclasses.replace(limits, block_size=request.block_size)
        else:
            violations.append(Violation("block_size", "0", "1 or more"))
    if request.weights_included and not request.HasField("memory"):
        violations.append(Violation("weights_included", "true", "false without memory"))
    query = CapacityQuery(
        model=_model(request, served, violations),
        memory=request.memory if request.HasField("memory") else cache_bytes,
        weights_included=request.weights_included,
        mix=tuple(map(_shape, request.mix)),
        engine=limits,
        clients=request.clients if request.HasField("clients") else None,
    )
    step_model, machine, target = None, None, None
    if request.HasField("step_model"):
        fields = _fields(request.step_model)
        step_model = _read(StepModel.from_dict, fields, "step_model", violations)
    if request.HasField("machine"):
        fields = _fields(request.machine)
        machine = _read(MachineLimits.from_dict, fields, "machine", violations)
    violations += query_violations(query)
    output = sum(shape.output for shape in query.mix)
    if max_output_tokens < output <= MAX_OUTPUT_TOKENS:
        allowed = f"at most {max_output_tokens} in all"
        violations.append(Violation("mix", f"{output} output tokens", allowed))
    if request.HasField("target"):
        target = Target(**_set_fields(request.target))
        known = request.HasField("step_model") or request.HasField("machine")
        violations += target_violations(target, query, can_predict=known)
    if violations:
        raise InvalidRequestError(violations)
    return PlanningCall(query, target, step_model, machine)


def _model(
    request: pb.PlanCapacityRequest, served: ModelConfig, violations: list[Violation]
) -> ModelConfig:
    """The served model with other heads and other types, as far as they can be used."""
    kv_cache_dtype: str = served.kv_cache_dtype
    model = served.replace(kv_cache_dtype="auto")
    if request.dtype in get_args(DTypeName):
        model = model.replace(dtype=request.dtype)
    elif request.dtype:
        allowed = f"{', '.join(get_args(DTypeName))}, or empty"
        violations.append(Violation("dtype", repr(request.dtype[:_MAX_SHOWN]), allowed))
    if request.kv_cache_dtype in get_args(KVCacheDType):
        kv_cache_dtype = request.kv_cache_dtype
    elif request.kv_cache_dtype:
        allowed = f"{', '.join(get_args(KVCacheDType))}, or empty"
        found = repr(request.kv_cache_dtype[:_MAX_SHOWN])
        violations.append(Violation("kv_cache_dtype", found, allowed))
    wrong = list(_head_violations(request.heads))
    violations += wrong
    if not wrong and request.HasField("heads"):
        changes = _set_fields(request.heads)
        if changes.get("window") == 0:
            changes["window"] = None
        try:
            model = with_heads(model, changes)
        except ValueError as error:
            violations.append(_violation("heads.", error))
    try:
        return model.replace(kv_cache_dtype=kv_cache_dtype)
    except ConfigError as error:
        if request.heads.HasField("head_dim"):
            allowed = "a multiple of 4, because keys and values have 8 bits"
            violations.append(Violation("heads.head_dim", str(request.heads.head_dim), allowed))
        else:
            violations.append(_violation("", error))
        return model


def _head_violations(heads: pb.PlannedHeads) -> Iterator[Violation]:
    for name, most in _MOST.items():
        value = getattr(heads, name)
        if heads.HasField(name) and not 1 <= value <= most:
            yield Violation(f"heads.{name}", str(value), f"1 to {most}")


def _shape(message: pb.RequestShape) -> RequestShape:
    share = message.share if message.HasField("share") else 1
    return RequestShape(message.prompt, message.output, share)


def _read(
    from_dict: Callable[[Mapping[str, Any]], T],
    fields: Mapping[str, Any],
    field: str,
    violations: list[Violation],
) -> T | None:
    try:
        return from_dict(fields)
    except ValueError as error:
        violations.append(_violation(f"{field}.", error))
        return None


def _violation(prefix: str, error: ValueError) -> Violation:
    """An error of a part, whose text is `field is given; allowed: ...`, as one of the request."""
    field, _, rest = str(error).partition(" is ")
    given, _, allowed = rest.partition("; allowed: ")
    return Violation(f"{prefix}{field}", given, allowed)


def _fields(message: pb.StepModel | pb.MachineLimits) -> dict[str, Any]:
    """As `to_dict` of the class of this name gives them."""
    plain = {name: getattr(message, name) for name in message.DESCRIPTOR.fields_by_name}
    if isinstance(message, pb.StepModel):
        plain["c"] = message.c if message.HasField("c") else None
        for name in ("weight_bytes", "kv_bytes", "flops"):
            plain[name] = list(plain[name])
        if not message.flops:
            del plain["flops"]
    return plain


def _set_fields(message: pb.PlannedHeads | pb.CapacityTarget) -> dict[str, Any]:
    return {descriptor.name: value for descriptor, value in message.ListFields()}


def _plan(plan: CapacityPlan) -> pb.CapacityPlan:
    message = pb.CapacityPlan(
        **{
            name: getattr(plan, name)
            for name in (
                "head_label", "dtype", "kv_cache_dtype", "block_size", "kv_bytes_per_token",
                "weight_bytes", "kv_cache_bytes", "num_blocks", "tokens", "longest_request",
                "concurrent", "concurrent_mean", "waste", "max_num_seqs", "running",
                "no_prediction",
            )
        }
    )  # fmt: skip
    if plan.step is not None:
        message.step_kv_bytes = plan.step.kv_bytes
        message.weight_flops_per_byte = plan.step.weight_flops_per_byte
        message.kv_flops_per_byte = plan.step.kv_flops_per_byte
    if plan.step_time is not None:
        message.prediction.CopyFrom(_prediction(plan.running, plan.step_time))
    return message


def _prediction(num_sequences: int, time: StepTime) -> pb.StepPrediction:
    return pb.StepPrediction(
        fitted=time.basis == "fit",
        step_seconds=time.seconds,
        decode_tokens_per_s=num_sequences / time.seconds,
        fixed_seconds=time.parts["fixed"],
        weight_seconds=time.parts["weights"],
        cache_seconds=time.parts["cache"],
        arithmetic_seconds=time.parts["arithmetic"],
        bound_by=time.bound_by,
        extrapolated=time.extrapolated,
        arithmetic_bound=time.arithmetic_bound or (),
    )


def _change(change: Change) -> pb.CapacityChange:
    return pb.CapacityChange(
        change=change.what, cost=change.cost, reaches=change.reaches, plan=_plan(change.plan)
    )
