from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("name", "family", "num_layers", "layers", "vocab_size", "max_model_len", "dtype", "device", "kv_bytes_per_token", "backend", "kv_block_size", "kv_blocks_total", "max_num_seqs", "max_num_batched_tokens", "eos_token_ids", "num_parameters", "hidden_size", "is_causal", "kv_cache_bytes", "kv_cache_dtype", "weight_dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    IS_CAUSAL_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    family: str
    num_layers: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerHeads]
    vocab_size: int
    max_model_len: int
    dtype: str
    device: str
    kv_bytes_per_token: int
    backend: str
    kv_block_size: int
    kv_blocks_total: int
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_parameters: int
    hidden_size: int
    is_causal: bool
    kv_cache_bytes: int
    kv_cache_dtype: str
    weight_dtype: str
    def __init__(self, name: _Optional[str] = ..., family: _Optional[str] = ..., num_layers: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerHeads, _Mapping]]] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., kv_bytes_per_token: _Optional[int] = ..., backend: _Optional[str] = ..., kv_block_size: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., num_parameters: _Optional[int] = ..., hidden_size: _Optional[int] = ..., is_causal: _Optional[bool] = ..., kv_cache_bytes: _Optional[int] = ..., kv_cache_dtype: _Optional[str] = ..., weight_dtype: _Optional[str] = ...) -> None: ...

class LayerHeads(_message.Message):
    __slots__ = ("num_heads", "num_kv_heads", "head_dim", "window", "head_windows", "sink_tokens", "learned_sinks", "softcap", "scale", "temperature", "qk_norm", "rope_theta", "rotary_dim", "rope_scaling", "alibi", "label")
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    HEAD_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    SINK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEARNED_SINKS_FIELD_NUMBER: _ClassVar[int]
    SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    QK_NORM_FIELD_NUMBER: _ClassVar[int]
    ROPE_THETA_FIELD_NUMBER: _ClassVar[int]
    ROTARY_DIM_FIELD_NUMBER: _ClassVar[int]
    ROPE_SCALING_FIELD_NUMBER: _ClassVar[int]
    ALIBI_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    head_windows: _containers.RepeatedScalarFieldContainer[int]
    sink_tokens: int
    learned_sinks: bool
    softcap: float
    scale: float
    temperature: _containers.RepeatedScalarFieldContainer[float]
    qk_norm: str
    rope_theta: float
    rotary_dim: int
    rope_scaling: str
    alibi: bool
    label: str
    def __init__(self, num_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., window: _Optional[int] = ..., head_windows: _Optional[_Iterable[int]] = ..., sink_tokens: _Optional[int] = ..., learned_sinks: _Optional[bool] = ..., softcap: _Optional[float] = ..., scale: _Optional[float] = ..., temperature: _Optional[_Iterable[float]] = ..., qk_norm: _Optional[str] = ..., rope_theta: _Optional[float] = ..., rotary_dim: _Optional[int] = ..., rope_scaling: _Optional[str] = ..., alibi: _Optional[bool] = ..., label: _Optional[str] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("num_running", "num_waiting", "kv_blocks_total", "kv_blocks_used", "kv_blocks_cached")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_cached: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_cached: _Optional[int] = ...) -> None: ...

class PlanCapacityRequest(_message.Message):
    __slots__ = ("heads", "dtype", "block_size", "memory", "weights_included", "mix", "clients", "step_model", "machine", "target", "kv_cache_dtype")
    HEADS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_INCLUDED_FIELD_NUMBER: _ClassVar[int]
    MIX_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    STEP_MODEL_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    heads: PlannedHeads
    dtype: str
    block_size: int
    memory: int
    weights_included: bool
    mix: _containers.RepeatedCompositeFieldContainer[RequestShape]
    clients: int
    step_model: StepModel
    machine: MachineLimits
    target: CapacityTarget
    kv_cache_dtype: str
    def __init__(self, heads: _Optional[_Union[PlannedHeads, _Mapping]] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., memory: _Optional[int] = ..., weights_included: _Optional[bool] = ..., mix: _Optional[_Iterable[_Union[RequestShape, _Mapping]]] = ..., clients: _Optional[int] = ..., step_model: _Optional[_Union[StepModel, _Mapping]] = ..., machine: _Optional[_Union[MachineLimits, _Mapping]] = ..., target: _Optional[_Union[CapacityTarget, _Mapping]] = ..., kv_cache_dtype: _Optional[str] = ...) -> None: ...

class PlannedHeads(_message.Message):
    __slots__ = ("num_heads", "num_kv_heads", "head_dim", "window", "sink_tokens")
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    SINK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    sink_tokens: int
    def __init__(self, num_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., window: _Optional[int] = ..., sink_tokens: _Optional[int] = ...) -> None: ...

class RequestShape(_message.Message):
    __slots__ = ("prompt", "output", "share")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    prompt: int
    output: int
    share: int
    def __init__(self, prompt: _Optional[int] = ..., output: _Optional[int] = ..., share: _Optional[int] = ...) -> None: ...

class StepModel(_message.Message):
    __slots__ = ("a", "c", "e", "r2", "error", "slopes", "weight_bytes", "kv_bytes", "f", "flops", "slope_errors")
    class SlopesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class SlopeErrorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    A_FIELD_NUMBER: _ClassVar[int]
    C_FIELD_NUMBER: _ClassVar[int]
    E_FIELD_NUMBER: _ClassVar[int]
    R2_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SLOPES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    F_FIELD_NUMBER: _ClassVar[int]
    FLOPS_FIELD_NUMBER: _ClassVar[int]
    SLOPE_ERRORS_FIELD_NUMBER: _ClassVar[int]
    a: float
    c: float
    e: float
    r2: float
    error: float
    slopes: _containers.ScalarMap[str, float]
    weight_bytes: _containers.RepeatedScalarFieldContainer[float]
    kv_bytes: _containers.RepeatedScalarFieldContainer[float]
    f: float
    flops: _containers.RepeatedScalarFieldContainer[float]
    slope_errors: _containers.ScalarMap[str, float]
    def __init__(self, a: _Optional[float] = ..., c: _Optional[float] = ..., e: _Optional[float] = ..., r2: _Optional[float] = ..., error: _Optional[float] = ..., slopes: _Optional[_Mapping[str, float]] = ..., weight_bytes: _Optional[_Iterable[float]] = ..., kv_bytes: _Optional[_Iterable[float]] = ..., f: _Optional[float] = ..., flops: _Optional[_Iterable[float]] = ..., slope_errors: _Optional[_Mapping[str, float]] = ...) -> None: ...

class MachineLimits(_message.Message):
    __slots__ = ("bytes_per_s", "flops_per_s")
    class FlopsPerSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    FLOPS_PER_S_FIELD_NUMBER: _ClassVar[int]
    bytes_per_s: float
    flops_per_s: _containers.ScalarMap[str, float]
    def __init__(self, bytes_per_s: _Optional[float] = ..., flops_per_s: _Optional[_Mapping[str, float]] = ...) -> None: ...

class CapacityTarget(_message.Message):
    __slots__ = ("concurrent", "tokens_per_s", "context")
    CONCURRENT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    concurrent: int
    tokens_per_s: float
    context: int
    def __init__(self, concurrent: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., context: _Optional[int] = ...) -> None: ...

class PlanCapacityResponse(_message.Message):
    __slots__ = ("plan", "changes", "reaches")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    REACHES_FIELD_NUMBER: _ClassVar[int]
    plan: CapacityPlan
    changes: _containers.RepeatedCompositeFieldContainer[CapacityChange]
    reaches: bool
    def __init__(self, plan: _Optional[_Union[CapacityPlan, _Mapping]] = ..., changes: _Optional[_Iterable[_Union[CapacityChange, _Mapping]]] = ..., reaches: _Optional[bool] = ...) -> None: ...

class CapacityPlan(_message.Message):
    __slots__ = ("head_label", "dtype", "block_size", "kv_bytes_per_token", "weight_bytes", "kv_cache_bytes", "num_blocks", "tokens", "longest_request", "concurrent", "concurrent_mean", "waste", "max_num_seqs", "running", "step_kv_bytes", "weight_flops_per_byte", "kv_flops_per_byte", "prediction", "no_prediction", "kv_cache_dtype")
    HEAD_LABEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LONGEST_REQUEST_FIELD_NUMBER: _ClassVar[int]
    CONCURRENT_FIELD_NUMBER: _ClassVar[int]
    CONCURRENT_MEAN_FIELD_NUMBER: _ClassVar[int]
    WASTE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    STEP_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FLOPS_PER_BYTE_FIELD_NUMBER: _ClassVar[int]
    KV_FLOPS_PER_BYTE_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_FIELD_NUMBER: _ClassVar[int]
    NO_PREDICTION_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    head_label: str
    dtype: str
    block_size: int
    kv_bytes_per_token: int
    weight_bytes: int
    kv_cache_bytes: int
    num_blocks: int
    tokens: int
    longest_request: int
    concurrent: int
    concurrent_mean: int
    waste: float
    max_num_seqs: int
    running: int
    step_kv_bytes: float
    weight_flops_per_byte: float
    kv_flops_per_byte: float
    prediction: StepPrediction
    no_prediction: str
    kv_cache_dtype: str
    def __init__(self, head_label: _Optional[str] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., kv_cache_bytes: _Optional[int] = ..., num_blocks: _Optional[int] = ..., tokens: _Optional[int] = ..., longest_request: _Optional[int] = ..., concurrent: _Optional[int] = ..., concurrent_mean: _Optional[int] = ..., waste: _Optional[float] = ..., max_num_seqs: _Optional[int] = ..., running: _Optional[int] = ..., step_kv_bytes: _Optional[float] = ..., weight_flops_per_byte: _Optional[float] = ..., kv_flops_per_byte: _Optional[float] = ..., prediction: _Optional[_Union[StepPrediction, _Mapping]] = ..., no_prediction: _Optional[str] = ..., kv_cache_dtype: _Optional[str] = ...) -> None: ...

class StepPrediction(_message.Message):
    __slots__ = ("fitted", "step_seconds", "decode_tokens_per_s", "fixed_seconds", "weight_seconds", "cache_seconds", "bound_by", "extrapolated", "arithmetic_bound", "arithmetic_seconds")
    FITTED_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    FIXED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BOUND_BY_FIELD_NUMBER: _ClassVar[int]
    EXTRAPOLATED_FIELD_NUMBER: _ClassVar[int]
    ARITHMETIC_BOUND_FIELD_NUMBER: _ClassVar[int]
    ARITHMETIC_SECONDS_FIELD_NUMBER: _ClassVar[int]
    fitted: bool
    step_seconds: float
    decode_tokens_per_s: float
    fixed_seconds: float
    weight_seconds: float
    cache_seconds: float
    bound_by: str
    extrapolated: bool
    arithmetic_bound: _containers.RepeatedScalarFieldContainer[str]
    arithmetic_seconds: float
    def __init__(self, fitted: _Optional[bool] = ..., step_seconds: _Optional[float] = ..., decode_tokens_per_s: _Optional[float] = ..., fixed_seconds: _Optional[float] = ..., weight_seconds: _Optional[float] = ..., cache_seconds: _Optional[float] = ..., bound_by: _Optional[str] = ..., extrapolated: _Optional[bool] = ..., arithmetic_bound: _Optional[_Iterable[str]] = ..., arithmetic_seconds: _Optional[float] = ...) -> None: ...

class CapacityChange(_message.Message):
    __slots__ = ("change", "cost", "reaches", "plan")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    REACHES_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    change: str
    cost: str
    reaches: bool
    plan: CapacityPlan
    def __init__(self, change: _Optional[str] = ..., cost: _Optional[str] = ..., reaches: _Optional[bool] = ..., plan: _Optional[_Union[CapacityPlan, _Mapping]] = ...) -> None: ...
