from protos.headroom.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Implementation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMPLEMENTATION_UNSPECIFIED: _ClassVar[Implementation]
    IMPLEMENTATION_FUSED: _ClassVar[Implementation]
    IMPLEMENTATION_SPLIT: _ClassVar[Implementation]

class Layout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYOUT_UNSPECIFIED: _ClassVar[Layout]
    LAYOUT_BATCH_HEADS_TOKENS_DIM: _ClassVar[Layout]
    LAYOUT_BATCH_TOKENS_HEADS_DIM: _ClassVar[Layout]
    LAYOUT_TOKENS_BATCH_HEADS_DIM: _ClassVar[Layout]

class MaskKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MASK_KIND_UNSPECIFIED: _ClassVar[MaskKind]
    MASK_KIND_CAUSAL: _ClassVar[MaskKind]
    MASK_KIND_BIDIRECTIONAL: _ClassVar[MaskKind]
    MASK_KIND_PREFIX: _ClassVar[MaskKind]
IMPLEMENTATION_UNSPECIFIED: Implementation
IMPLEMENTATION_FUSED: Implementation
IMPLEMENTATION_SPLIT: Implementation
LAYOUT_UNSPECIFIED: Layout
LAYOUT_BATCH_HEADS_TOKENS_DIM: Layout
LAYOUT_BATCH_TOKENS_HEADS_DIM: Layout
LAYOUT_TOKENS_BATCH_HEADS_DIM: Layout
MASK_KIND_UNSPECIFIED: MaskKind
MASK_KIND_CAUSAL: MaskKind
MASK_KIND_BIDIRECTIONAL: MaskKind
MASK_KIND_PREFIX: MaskKind

class AttendRequest(_message.Message):
    __slots__ = ("qkv", "hidden", "implementation", "variant", "want_weights", "want_lse", "want_head_outputs")
    QKV_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    IMPLEMENTATION_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    WANT_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WANT_LSE_FIELD_NUMBER: _ClassVar[int]
    WANT_HEAD_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    qkv: QKV
    hidden: HiddenInput
    implementation: Implementation
    variant: Variant
    want_weights: bool
    want_lse: bool
    want_head_outputs: bool
    def __init__(self, qkv: _Optional[_Union[QKV, _Mapping]] = ..., hidden: _Optional[_Union[HiddenInput, _Mapping]] = ..., implementation: _Optional[_Union[Implementation, str]] = ..., variant: _Optional[_Union[Variant, _Mapping]] = ..., want_weights: _Optional[bool] = ..., want_lse: _Optional[bool] = ..., want_head_outputs: _Optional[bool] = ...) -> None: ...

class QKV(_message.Message):
    __slots__ = ("query", "key", "value", "layout")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    query: _tensor_pb2.Tensor
    key: _tensor_pb2.Tensor
    value: _tensor_pb2.Tensor
    layout: Layout
    def __init__(self, query: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., key: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., value: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., layout: _Optional[_Union[Layout, str]] = ...) -> None: ...

class HiddenInput(_message.Message):
    __slots__ = ("hidden", "layer")
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    hidden: _tensor_pb2.Tensor
    layer: int
    def __init__(self, hidden: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., layer: _Optional[int] = ...) -> None: ...

class Variant(_message.Message):
    __slots__ = ("mask", "prefix_lengths", "segment_ids", "key_lengths", "visible", "bias", "window", "head_windows", "sink_tokens", "scale", "temperature", "softcap", "sinks", "alibi", "rope", "query_positions", "key_positions")
    MASK_FIELD_NUMBER: _ClassVar[int]
    PREFIX_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_IDS_FIELD_NUMBER: _ClassVar[int]
    KEY_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    VISIBLE_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    HEAD_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    SINK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    SINKS_FIELD_NUMBER: _ClassVar[int]
    ALIBI_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    QUERY_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    KEY_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    mask: MaskKind
    prefix_lengths: _containers.RepeatedScalarFieldContainer[int]
    segment_ids: _tensor_pb2.Tensor
    key_lengths: _containers.RepeatedScalarFieldContainer[int]
    visible: _tensor_pb2.Tensor
    bias: _tensor_pb2.Tensor
    window: int
    head_windows: _containers.RepeatedScalarFieldContainer[int]
    sink_tokens: int
    scale: float
    temperature: _containers.RepeatedScalarFieldContainer[float]
    softcap: float
    sinks: _containers.RepeatedScalarFieldContainer[float]
    alibi: Alibi
    rope: Rope
    query_positions: _tensor_pb2.Tensor
    key_positions: _tensor_pb2.Tensor
    def __init__(self, mask: _Optional[_Union[MaskKind, str]] = ..., prefix_lengths: _Optional[_Iterable[int]] = ..., segment_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., key_lengths: _Optional[_Iterable[int]] = ..., visible: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., bias: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., window: _Optional[int] = ..., head_windows: _Optional[_Iterable[int]] = ..., sink_tokens: _Optional[int] = ..., scale: _Optional[float] = ..., temperature: _Optional[_Iterable[float]] = ..., softcap: _Optional[float] = ..., sinks: _Optional[_Iterable[float]] = ..., alibi: _Optional[_Union[Alibi, _Mapping]] = ..., rope: _Optional[_Union[Rope, _Mapping]] = ..., query_positions: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., key_positions: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Alibi(_message.Message):
    __slots__ = ("slopes", "before_scale", "bfloat16")
    SLOPES_FIELD_NUMBER: _ClassVar[int]
    BEFORE_SCALE_FIELD_NUMBER: _ClassVar[int]
    BFLOAT16_FIELD_NUMBER: _ClassVar[int]
    slopes: _containers.RepeatedScalarFieldContainer[float]
    before_scale: bool
    bfloat16: bool
    def __init__(self, slopes: _Optional[_Iterable[float]] = ..., before_scale: _Optional[bool] = ..., bfloat16: _Optional[bool] = ...) -> None: ...

class Rope(_message.Message):
    __slots__ = ("theta", "rotary_dim", "interleaved", "linear", "dynamic_ntk", "yarn", "llama3", "longrope")
    THETA_FIELD_NUMBER: _ClassVar[int]
    ROTARY_DIM_FIELD_NUMBER: _ClassVar[int]
    INTERLEAVED_FIELD_NUMBER: _ClassVar[int]
    LINEAR_FIELD_NUMBER: _ClassVar[int]
    DYNAMIC_NTK_FIELD_NUMBER: _ClassVar[int]
    YARN_FIELD_NUMBER: _ClassVar[int]
    LLAMA3_FIELD_NUMBER: _ClassVar[int]
    LONGROPE_FIELD_NUMBER: _ClassVar[int]
    theta: float
    rotary_dim: int
    interleaved: bool
    linear: LinearScaling
    dynamic_ntk: DynamicNtkScaling
    yarn: YarnScaling
    llama3: Llama3Scaling
    longrope: LongRopeScaling
    def __init__(self, theta: _Optional[float] = ..., rotary_dim: _Optional[int] = ..., interleaved: _Optional[bool] = ..., linear: _Optional[_Union[LinearScaling, _Mapping]] = ..., dynamic_ntk: _Optional[_Union[DynamicNtkScaling, _Mapping]] = ..., yarn: _Optional[_Union[YarnScaling, _Mapping]] = ..., llama3: _Optional[_Union[Llama3Scaling, _Mapping]] = ..., longrope: _Optional[_Union[LongRopeScaling, _Mapping]] = ...) -> None: ...

class LinearScaling(_message.Message):
    __slots__ = ("factor",)
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    factor: float
    def __init__(self, factor: _Optional[float] = ...) -> None: ...

class DynamicNtkScaling(_message.Message):
    __slots__ = ("factor", "original_length")
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_LENGTH_FIELD_NUMBER: _ClassVar[int]
    factor: float
    original_length: int
    def __init__(self, factor: _Optional[float] = ..., original_length: _Optional[int] = ...) -> None: ...

class YarnScaling(_message.Message):
    __slots__ = ("factor", "original_length", "attention_factor", "beta_fast", "beta_slow", "truncate")
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_LENGTH_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FACTOR_FIELD_NUMBER: _ClassVar[int]
    BETA_FAST_FIELD_NUMBER: _ClassVar[int]
    BETA_SLOW_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    def __init__(self, factor: _Optional[float] = ..., original_length: _Optional[int] = ..., attention_factor: _Optional[float] = ..., beta_fast: _Optional[float] = ..., beta_slow: _Optional[float] = ..., truncate: _Optional[bool] = ...) -> None: ...

class Llama3Scaling(_message.Message):
    __slots__ = ("factor", "low_freq_factor", "high_freq_factor", "original_length")
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    LOW_FREQ_FACTOR_FIELD_NUMBER: _ClassVar[int]
    HIGH_FREQ_FACTOR_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_LENGTH_FIELD_NUMBER: _ClassVar[int]
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    def __init__(self, factor: _Optional[float] = ..., low_freq_factor: _Optional[float] = ..., high_freq_factor: _Optional[float] = ..., original_length: _Optional[int] = ...) -> None: ...

class LongRopeScaling(_message.Message):
    __slots__ = ("short_factor", "long_factor", "original_length", "attention_factor")
    SHORT_FACTOR_FIELD_NUMBER: _ClassVar[int]
    LONG_FACTOR_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_LENGTH_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FACTOR_FIELD_NUMBER: _ClassVar[int]
    short_factor: _containers.RepeatedScalarFieldContainer[float]
    long_factor: _containers.RepeatedScalarFieldContainer[float]
    original_length: int
    attention_factor: float
    def __init__(self, short_factor: _Optional[_Iterable[float]] = ..., long_factor: _Optional[_Iterable[float]] = ..., original_length: _Optional[int] = ..., attention_factor: _Optional[float] = ...) -> None: ...

class AttendResponse(_message.Message):
    __slots__ = ("output", "weights", "lse", "head_outputs", "backend")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    HEAD_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    output: _tensor_pb2.Tensor
    weights: _tensor_pb2.Tensor
    lse: _tensor_pb2.Tensor
    head_outputs: _tensor_pb2.Tensor
    backend: str
    def __init__(self, output: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., lse: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., head_outputs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., backend: _Optional[str] = ...) -> None: ...
