"""How much memory an attention takes, known from its shapes, before any of it is allocated."""

from dataclasses import dataclass

from models.config import ITEMSIZE, ModelConfig
from service.attention.request import AttentionCall, HiddenInput, QKVInput, Wanted
from service.errors import AttentionTooLargeError

# What surrounds the arrays in a response.
_ENVELOPE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class AttentionLimits:
    """Bytes that one attention may take.

    Attributes:
        max_bytes: of inputs, scores, keys and values for each query head, and answer together.
            All are counted even where the implementation never holds them, so that this bounds
            the time as well.
        max_answer_bytes: of the answer alone.
    """

    max_bytes: int
    max_answer_bytes: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one attention: what came in, what exists on the way, what goes out."""

    input: int
    intermediate: int
    answer: int

    @property
    def total(self) -> int:
        return self.input + self.intermediate + self.answer


def check_size(call: AttentionCall, config: ModelConfig, limits: AttentionLimits) -> None:
    """Raise AttentionTooLargeError if a call would take more than is allowed.

    Args:
        config: the served model's, with the type that it computes in.
    """
    footprint = footprint_of(call, config)
    if footprint.total > limits.max_bytes:
        raise AttentionTooLargeError(
            "inputs, scores and answer", footprint.total, limits.max_bytes, "attend_max_bytes"
        )
    answer = footprint.answer + _ENVELOPE_BYTES
    if answer > limits.max_answer_bytes:
        raise AttentionTooLargeError(
            "the answer", answer, limits.max_answer_bytes, "max_message_bytes"
        )


def footprint_of(call: AttentionCall, config: ModelConfig) -> Footprint:
    match call.input:
        case QKVInput() as given:
            return _of_qkv(call, given)
        case HiddenInput() as given:
            return _of_hidden(call, given, config)


def _of_qkv(call: AttentionCall, given: QKVInput) -> Footprint:
    batch, num_heads, queries, dim = given.query.shape
    keys, value_dim = given.value.shape[2:]
    arrays = [given.query, given.key, given.value]
    if call.variant is not None:
        arrays.extend(call.variant.arrays)
    rows = batch * num_heads * queries
    itemsize = given.query.values.itemsize
    number = max(itemsize, 4)
    output = rows * value_dim * itemsize
    scores = rows * keys * number
    return Footprint(
        input=sum(array.values.nbytes for array in arrays),
        intermediate=scores + batch * num_heads * keys * (dim + value_dim) * itemsize,
        answer=output + _beside(call.wanted, scores, rows * number, output),
    )


def _of_hidden(call: AttentionCall, given: HiddenInput, config: ModelConfig) -> Footprint:
    *leading, tokens, hidden_size = given.hidden.shape
    batch = leading[0] if leading else 1
    heads = config.layers[given.layer]
    rows = batch * heads.num_heads * tokens
    itemsize = ITEMSIZE[config.dtype]
    scores = rows * tokens * 4
    head_outputs = rows * hidden_size * itemsize
    output = batch * tokens * hidden_size * itemsize
    return Footprint(
        input=given.hidden.values.nbytes,
        intermediate=scores
        + 3 * rows * heads.head_dim * itemsize
        + (head_outputs if call.wanted.split else 0),
        answer=output + _beside(call.wanted, scores, rows * 4, head_outputs),
    )


def _beside(wanted: Wanted, weights: int, lse: int, head_outputs: int) -> int:
    """Bytes of an answer beside its output."""
    parts = ((wanted.weights, weights), (wanted.lse, lse), (wanted.head_outputs, head_outputs))
    return sum(num_bytes for is_wanted, num_bytes in parts if is_wanted)
