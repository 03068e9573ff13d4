"""How long a decode step would take, and what it would wait for."""

from dataclasses import dataclass
from typing import Literal

from models.config import ITEMSIZE, ModelConfig
from service.capacity.machine import MachineLimits
from service.capacity.step_model import StepModel

Part = Literal["fixed", "weights", "cache", "arithmetic"]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """What one decode step has to do.

    Attributes:
        num_sequences: each gets one token; a mean of steps need not be whole.
        weight_bytes, kv_bytes: to be read.
        weight_flops_per_byte: operations on each weight byte, `num_sequences` for 2-byte types.
        kv_flops_per_byte: operations on each key/value byte, query heads over key/value heads
            for 2-byte types.
    """

    num_sequences: float
    weight_bytes: int
    kv_bytes: float
    weight_flops_per_byte: float
    kv_flops_per_byte: float

    @property
    def flops(self) -> float:
        """Multiplications and additions: of the weights with every sequence, and of attention."""
        weights = self.weight_flops_per_byte * self.weight_bytes
        return weights + self.kv_flops_per_byte * self.kv_bytes


@dataclass(frozen=True, slots=True)
class StepTime:
    """A decode step's time.

    Attributes:
        basis: `fit` predicts, from a step model; `copy` is how long a plain copy takes to read as
            many bytes: no bound, caches read faster and arithmetic takes longer.
        seconds: of one step.
        parts: seconds of what every step costs, of reading the weights, of reading the cache and
            of arithmetic. A step model that does not know the weights' part, its `c` None or 0,
            counts it as fixed.
        bound_by: the largest part.
        extrapolated: more or fewer bytes or operations than the fitted samples had.
        arithmetic_bound: the parts that have more operations per byte than the machine's ridge:
            there bytes alone say too little. None if the ridge was not measured.
    """

    basis: Literal["fit", "copy"]
    seconds: float
    parts: dict[Part, float]
    bound_by: Part
    extrapolated: bool
    arithmetic_bound: tuple[Part, ...] | None


def decode_step(
    model: ModelConfig, num_sequences: float, weight_bytes: int, kv_bytes: float
) -> DecodeStep:
    """The work of a step in the type of `model`.

    Args:
        kv_bytes: keys and values that all sequences together read.
    """
    # A query head multiplies and adds each key once, and each value once.
    flops = sum(2 * heads.num_heads * heads.head_dim for heads in model.layers)
    row_bytes = sum(heads.num_kv_heads * model.kv_row_bytes(heads) for heads in model.layers)
    return DecodeStep(
        num_sequences=num_sequences,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        weight_flops_per_byte=2 * num_sequences / ITEMSIZE[model.dtype],
        kv_flops_per_byte=flops / row_bytes,
    )


def step_time(
    step: DecodeStep,
    model: ModelConfig,
    step_model: StepModel | None,
    machine: MachineLimits | None,
) -> StepTime | None:
    """Predict a step from a step model, else from the bandwidth of a copy; None without both.

    Raises:
        ValueError: the step model was fitted for other weights, and for these only.
    """
    if step_model is not None:
        seconds = step_model.predict(step.weight_bytes, step.kv_bytes, step.flops)
        weights = (step_model.c or 0.0) * step.weight_bytes
        cache = step_model.e * step.kv_bytes
        arithmetic = step_model.f * step.flops
        extrapolated = not (
            _within(step.weight_bytes, step_model.weight_bytes)
            and _within(step.kv_bytes, step_model.kv_bytes)
            and (step_model.f == 0 or _within(step.flops, step_model.flops))
        )
    elif machine is not None:
        weights = step.weight_bytes / machine.bytes_per_s
        cache = step.kv_bytes / machine.bytes_per_s
        arithmetic = 0.0
        seconds, extrapolated = weights + cache, False
    else:
        return None
    parts: dict[Part, float] = {
        "fixed": max(seconds - weights - cache - arithmetic, 0.0),
        "weights": weights,
        "cache": cache,
        "arithmetic": arithmetic,
    }
    return StepTime(
        basis="copy" if step_model is None else "fit",
        seconds=seconds,
        parts=parts,
        bound_by=max(parts, key=lambda part: parts[part]),
        extrapolated=extrapolated,
        arithmetic_bound=None if machine is None else _beyond(step, machine.ridge(model.dtype)),
    )


def _beyond(step: DecodeStep, ridge: float) -> tuple[Part, ...]:
    intensities: dict[Part, float] = {
        "weights": step.weight_flops_per_byte,
        "cache": step.kv_flops_per_byte,
    }
    return tuple(part for part, intensity in intensities.items() if intensity > ridge)


def _within(value: float, limits: tuple[float, float]) -> bool:
    """With room for what averages leave out."""
    return 0.99 * limits[0] <= value <= 1.01 * limits[1]
