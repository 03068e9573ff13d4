"""AttendRequest to a checked and bounded call, and its result to AttendResponse."""

from models.config import ModelConfig
from models.positions import (
    Alibi,
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from protos.headroom.v1 import attention_pb2 as pb
from protos.headroom.v1 import tensor_pb2
from service.attention.limits import AttentionLimits, check_size
from service.attention.request import (
    AttentionCall,
    AttentionResult,
    HiddenInput,
    QKVInput,
    Variant,
    Wanted,
)
from service.codec.attention_checks import AXES, attend_violations
from service.codec.rope_checks import DEFAULT_THETA
from service.engine.errors import InvalidRequestError
from service.tensors import WireArray


class AttentionDecoder:
    """Reads attention requests for one model.

    Args:
        config: the model's, with the type that it computes in.
        max_model_len: tokens of a hidden input.
    """

    def __init__(self, config: ModelConfig, max_model_len: int, limits: AttentionLimits) -> None:
        self._config = config
        self._max_model_len = max_model_len
        self._limits = limits

    def call(self, request: pb.AttendRequest) -> AttentionCall:
        """Check a request.

        Raises:
            InvalidRequestError: names every wrong field.
            AttentionTooLargeError: see `check_size`.
        """
        violations = list(attend_violations(request, self._config, self._max_model_len))
        if violations:
            raise InvalidRequestError(violations)
        wanted = Wanted(
            split=request.implementation == pb.IMPLEMENTATION_SPLIT,
            weights=request.want_weights,
            lse=request.want_lse,
            head_outputs=request.want_head_outputs,
        )
        if request.HasField("qkv"):
            call = AttentionCall(_qkv(request.qkv), _variant(request), wanted)
        else:
            hidden = HiddenInput(WireArray.of(request.hidden.hidden), request.hidden.layer)
            call = AttentionCall(hidden, None, wanted)
        check_size(call, self._config, self._limits)
        return call


def attend_response(result: AttentionResult) -> pb.AttendResponse:
    def message(array: WireArray | None) -> tensor_pb2.Tensor | None:
        return None if array is None else array.to_message()

    return pb.AttendResponse(
        output=result.output.to_message(),
        weights=message(result.weights),
        lse=message(result.lse),
        head_outputs=message(result.head_outputs),
        backend=result.backend,
    )


def _qkv(qkv: pb.QKV) -> QKVInput:
    axes = AXES[qkv.layout]

    def heads_first(tensor: tensor_pb2.Tensor) -> WireArray:
        array = WireArray.of(tensor)
        return WireArray(array.dtype, array.values.transpose(axes))

    return QKVInput(
        heads_first(qkv.query), heads_first(qkv.key), heads_first(qkv.value), _inverse(axes)
    )


def _inverse(axes: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    first, second, third, fourth = (axes.index(axis) for axis in range(4))
    return first, second, third, fourth


def _variant(request: pb.AttendRequest) -> Variant:
    variant, query = request.variant, request.qkv.query

    def array(tensor: tensor_pb2.Tensor, is_set: bool) -> WireArray | None:
        return WireArray.of(tensor) if is_set else None

    window: int | tuple[int | None, ...] | None = None
    if variant.HasField("window"):
        window = variant.window
    elif variant.head_windows:
        window = tuple(each or None for each in variant.head_windows)
    return Variant(
        causal=variant.mask != pb.MASK_KIND_BIDIRECTIONAL,
        prefix_lengths=tuple(variant.prefix_lengths),
        segment_ids=array(variant.segment_ids, variant.HasField("segment_ids")),
        key_lengths=tuple(variant.key_lengths),
        visible=array(variant.visible, variant.HasField("visible")),
        bias=array(variant.bias, variant.HasField("bias")),
        window=window,
        sink_tokens=variant.sink_tokens,
        scale=variant.scale if variant.HasField("scale") else None,
        temperature=tuple(variant.temperature),
        softcap=variant.softcap if variant.HasField("softcap") else None,
        sinks=tuple(variant.sinks),
        alibi=_alibi(variant.alibi) if variant.HasField("alibi") else None,
        rope=_rope(variant.rope, query.shape[3]) if variant.HasField("rope") else None,
        query_positions=array(variant.query_positions, variant.HasField("query_positions")),
        key_positions=array(variant.key_positions, variant.HasField("key_positions")),
    )


def _alibi(alibi: pb.Alibi) -> Alibi:
    return Alibi(tuple(alibi.slopes), alibi.before_scale, alibi.bfloat16)


def _rope(rope: pb.Rope, head_dim: int) -> RopeConfig:
    return RopeConfig(
        theta=rope.theta if rope.HasField("theta") else DEFAULT_THETA,
        rotary_dim=rope.rotary_dim if rope.HasField("rotary_dim") else head_dim,
        interleaved=rope.interleaved,
        scaling=_scaling(rope),
    )


def _scaling(rope: pb.Rope) -> RopeScaling | None:
    match rope.WhichOneof("scaling"):
        case "linear":
            return LinearScaling(rope.linear.factor)
        case "dynamic_ntk":
            return DynamicNtkScaling(rope.dynamic_ntk.factor, rope.dynamic_ntk.original_length)
        case "yarn":
            return _yarn(rope.yarn)
        case "llama3":
            llama3 = rope.llama3
            return Llama3Scaling(
                llama3.factor,
                llama3.low_freq_factor,
                llama3.high_freq_factor,
                llama3.original_length,
            )
        case "longrope":
            longrope = rope.longrope
            return LongRopeScaling(
                tuple(longrope.short_factor),
                tuple(longrope.long_factor),
                longrope.original_length,
                longrope.attention_factor if longrope.HasField("attention_factor") else 1.0,
            )
        case _:
            return None


def _yarn(yarn: pb.YarnScaling) -> YarnScaling:
    return YarnScaling(
        factor=yarn.factor,
        original_length=yarn.original_length,
        attention_factor=yarn.attention_factor if yarn.HasField("attention_factor") else 1.0,
        beta_fast=yarn.beta_fast if yarn.HasField("beta_fast") else 32.0,
        beta_slow=yarn.beta_slow if yarn.HasField("beta_slow") else 1.0,
        truncate=yarn.truncate if yarn.HasField("truncate") else True,
    )
