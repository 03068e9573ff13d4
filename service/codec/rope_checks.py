"""What can be wrong with a Rope message."""

import math
from collections.abc import Iterator, Sequence

from protos.headroom.v1 import attention_pb2 as pb
from service.engine.errors import Violation

DEFAULT_THETA = 10_000.0


def rope_violations(field: str, rope: pb.Rope, head_dim: int | None) -> Iterator[Violation]:
    """Check a rotation of heads of a width; None if that is not known."""
    theta = rope.theta if rope.HasField("theta") else DEFAULT_THETA
    if not 1 < theta < math.inf:
        yield Violation(f"{field}.theta", f"{theta:g}", "a finite number above 1")
    rotary_dim = rope.rotary_dim if rope.HasField("rotary_dim") else head_dim
    if rotary_dim is None:
        return
    if rotary_dim < 2 or rotary_dim % 2 or (head_dim is not None and rotary_dim > head_dim):
        most = "" if head_dim is None else f", at most the {head_dim} dimensions of a head"
        yield Violation(f"{field}.rotary_dim", str(rotary_dim), f"even, 2 or more{most}")
    scaling = rope.WhichOneof("scaling")
    if scaling is None:
        return
    inside = f"{field}.{scaling}"
    message = getattr(rope, scaling)
    if scaling != "longrope":
        yield from _positive(f"{inside}.factor", message.factor)
    if scaling != "linear" and message.original_length < 1:
        yield Violation(f"{inside}.original_length", "0", "1 or more")
    match scaling:
        case "dynamic_ntk":
            if message.factor < 1:
                yield Violation(f"{inside}.factor", f"{message.factor:g}", "1 or more")
            if rotary_dim == 2:
                yield Violation(f"{field}.rotary_dim", "2", "4 or more with dynamic_ntk")
        case "yarn":
            yield from _yarn(inside, rope.yarn)
        case "llama3":
            yield from _llama3(inside, rope.llama3)
        case "longrope":
            for name in ("short_factor", "long_factor"):
                yield from _divisors(f"{inside}.{name}", getattr(message, name), rotary_dim // 2)
            yield from _attention_factor(inside, message)


def _yarn(field: str, yarn: pb.YarnScaling) -> Iterator[Violation]:
    yield from _attention_factor(field, yarn)
    fast = yarn.beta_fast if yarn.HasField("beta_fast") else 32.0
    slow = yarn.beta_slow if yarn.HasField("beta_slow") else 1.0
    yield from _positive(f"{field}.beta_slow", slow)
    if not slow <= fast < math.inf:
        yield Violation(f"{field}.beta_fast", f"{fast:g}", f"beta_slow={slow:g} or more")


def _llama3(field: str, llama3: pb.Llama3Scaling) -> Iterator[Violation]:
    low, high = llama3.low_freq_factor, llama3.high_freq_factor
    yield from _positive(f"{field}.low_freq_factor", low)
    if not low < high < math.inf:
        yield Violation(f"{field}.high_freq_factor", f"{high:g}", f"above low_freq_factor={low:g}")


def _attention_factor(
    field: str, scaling: pb.YarnScaling | pb.LongRopeScaling
) -> Iterator[Violation]:
    if scaling.HasField("attention_factor"):
        yield from _positive(f"{field}.attention_factor", scaling.attention_factor)


def _divisors(field: str, values: Sequence[float], count: int) -> Iterator[Violation]:
    if len(values) != count:
        yield Violation(field, f"{len(values)} numbers", f"one for each of {count} rotated pairs")
    for index, value in enumerate(values):
        if not 0 < value < math.inf:
            yield from _positive(f"{field}[{index}]", value)
            return


def _positive(field: str, value: float) -> Iterator[Violation]:
    if not 0 < value < math.inf:
        yield Violation(field, f"{value:g}", "a finite number above 0")
