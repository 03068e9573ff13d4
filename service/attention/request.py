"""What AttentionService is asked to compute, checked already."""

from dataclasses import dataclass

from models.positions import Alibi, RopeConfig
from service.tensors import WireArray


@dataclass(frozen=True, slots=True, eq=False)
class QKVInput:
    """Queries `[batch, heads, queries, dim]`, keys and values `[batch, kv_heads, keys, ...]`.

    Attributes:
        axes: where batch, heads, tokens and dim stand in the output that the client wants.
    """

    query: WireArray
    key: WireArray
    value: WireArray
    axes: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class HiddenInput:
    """What a layer's attention module reads: `[tokens, hidden]` or `[batch, tokens, hidden]`."""

    hidden: WireArray
    layer: int


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """Everything between query · key and the softmax; see `headroom.v1.Variant`.

    Attributes:
        causal: a query sees no later key, but for the first `prefix_lengths` of its row.
        scale: None is `dim ** -0.5`.
    """

    causal: bool
    prefix_lengths: tuple[int, ...] = ()
    segment_ids: WireArray | None = None
    key_lengths: tuple[int, ...] = ()
    visible: WireArray | None = None
    bias: WireArray | None = None
    window: int | tuple[int | None, ...] | None = None
    sink_tokens: int = 0
    scale: float | None = None
    temperature: tuple[float, ...] = ()
    softcap: float | None = None
    sinks: tuple[float, ...] = ()
    alibi: Alibi | None = None
    rope: RopeConfig | None = None
    query_positions: WireArray | None = None
    key_positions: WireArray | None = None

    @property
    def hides_nothing(self) -> bool:
        """Whether keys are hidden by causality and windows alone, at plain positions."""
        return not (self.arrays or self.key_lengths or self.prefix_lengths)

    @property
    def arrays(self) -> tuple[WireArray, ...]:
        every = (
            self.segment_ids,
            self.visible,
            self.bias,
            self.query_positions,
            self.key_positions,
        )
        return tuple(array for array in every if array is not None)


@dataclass(frozen=True, slots=True)
class Wanted:
    """How to compute, and what to return beside the output."""

    split: bool = False
    weights: bool = False
    lse: bool = False
    head_outputs: bool = False

    @property
    def scores(self) -> bool:
        """Whether only an implementation that has all scores will do."""
        return self.split or self.weights or self.lse


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One call.

    Attributes:
        variant: None where a layer's own configuration decides.
    """

    input: QKVInput | HiddenInput
    variant: Variant | None
    wanted: Wanted


@dataclass(frozen=True, slots=True, eq=False)
class AttentionResult:
    """What a call is answered with; see `headroom.v1.AttendResponse`."""

    output: WireArray
    weights: WireArray | None
    lse: WireArray | None
    head_outputs: WireArray | None
    backend: str
