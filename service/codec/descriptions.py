"""The served model and its load, as messages of ModelService."""

from models.config import HeadConfig
from models.positions import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
)
from protos.headroom.v1 import models_pb2
from service.engine.engine import Engine
from service.engine.stats import EngineLoad

_SCALING_NAMES: dict[type, str] = {
    type(None): "",
    LinearScaling: "linear",
    DynamicNtkScaling: "dynamic_ntk",
    YarnScaling: "yarn",
    Llama3Scaling: "llama3",
    LongRopeScaling: "longrope",
}


def model_description(engine: Engine) -> models_pb2.GetModelResponse:
    config = engine.served_config
    model = engine.model_runner.model
    return models_pb2.GetModelResponse(
        name=config.name,
        family=config.family,
        num_layers=config.num_layers,
        layers=map(layer_heads, config.layers),
        vocab_size=config.vocab_size,
        max_model_len=engine.max_model_len,
        dtype=config.dtype,
        device=str(model.device),
        kv_bytes_per_token=engine.kv_bytes_per_token,
        backend=engine.backend,
        kv_block_size=engine.config.block_size,
        kv_blocks_total=engine.kv_cache.num_pages,
        max_num_seqs=engine.config.max_num_seqs,
        max_num_batched_tokens=engine.config.max_num_batched_tokens,
        eos_token_ids=config.eos_token_ids,
        num_parameters=model.num_parameters,
        hidden_size=config.hidden_size,
        is_causal=config.is_causal,
        kv_cache_bytes=engine.kv_cache.nbytes,
        kv_cache_dtype=config.kv_cache_dtype,
        weight_dtype=engine.config.weight_dtype,
    )


def layer_heads(heads: HeadConfig) -> models_pb2.LayerHeads:
    windows = heads.window if isinstance(heads.window, tuple) else ()
    alike = len(set(windows)) <= 1
    rope = heads.rope
    return models_pb2.LayerHeads(
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        window=heads.windows[0] if alike else None,
        head_windows=[] if alike else [window or 0 for window in windows],
        sink_tokens=heads.sink_tokens,
        learned_sinks=heads.learned_sinks,
        softcap=heads.softcap,
        scale=heads.softmax_scale,
        temperature=heads.temperature or (),
        qk_norm="" if heads.qk_norm is None else heads.qk_norm.scope,
        rope_theta=None if rope is None else rope.theta,
        rotary_dim=0 if rope is None else rope.rotary_dim,
        rope_scaling="" if rope is None else _SCALING_NAMES[type(rope.scaling)],
        alibi=heads.alibi is not None,
        label=heads.label,
    )


def load_description(load: EngineLoad) -> models_pb2.GetLoadResponse:
    return models_pb2.GetLoadResponse(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        kv_blocks_total=load.kv_blocks_total,
        kv_blocks_used=load.kv_blocks_used,
        kv_blocks_cached=load.kv_blocks_cached,
    )
