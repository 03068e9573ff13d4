"""Whether an engine can serve a model within its limits; found out before any weight is loaded."""

from models.config import ModelConfig
from service.engine.config import EngineConfig


def as_served(model_config: ModelConfig, config: EngineConfig) -> ModelConfig:
    """The model's configuration, with the types that an engine with these settings uses.

    Raises:
        ConfigError: its heads cannot be kept in the type of the cache.
    """
    dtype = model_config.dtype if config.dtype == "auto" else config.dtype
    return model_config.replace(dtype=dtype, kv_cache_dtype=config.kv_cache_dtype)


def check_supported(model_config: ModelConfig, config: EngineConfig) -> None:
    """Raise ValueError if the model cannot be served with these settings."""
    check_cache_is_read(config.kernel, config)
    if config.enable_prefix_caching and model_config.rope_depends_on_length:
        raise ValueError(
            "enable_prefix_caching is true; allowed: false, because this model rotates equal "
            "tokens differently in prompts of different lengths (dynamic or LongRoPE scaling)"
        )
    if model_config.is_causal:
        return
    if config.enable_prefix_caching:
        raise ValueError(
            "enable_prefix_caching is true; allowed: false, because in an encoder the beginning of "
            "a text depends on its end"
        )
    longest = max_model_len(config, model_config)
    if longest > config.max_num_batched_tokens:
        raise ValueError(
            f"max_num_batched_tokens is {config.max_num_batched_tokens}; allowed: at least "
            f"max_model_len={longest}, because an encoder computes a text in one step"
        )


def check_cache_is_read(kernels: str, config: EngineConfig) -> None:
    """Raise ValueError if one of the kernels, joined by `+`, cannot read the cache."""
    if config.kv_cache_dtype == "int8" and "paged_triton" in kernels.split("+"):
        raise ValueError(
            "kv_cache_dtype is 'int8'; allowed: auto, because the kernel paged_triton reads no "
            "cache of 8 bits"
        )


def max_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    """Prompt and output tokens of one request.

    Raises:
        ValueError: more are configured than the model has positions for.
    """
    longest = model_config.max_position_embeddings
    if config.max_model_len is None:
        return longest
    if config.max_model_len > longest:
        raise ValueError(
            f"max_model_len is {config.max_model_len}; allowed: at most {longest}, "
            "the positions that the model knows"
        )
    return config.max_model_len
