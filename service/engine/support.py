"""Whether an engine can serve a model within its limits; found out before any weight is loaded."""

from models.config import ModelConfig
from service.engine.config import EngineConfig


def check_supported(model_config: ModelConfig, config: EngineConfig) -> None:
    """Raise ValueError if the model cannot be served with these settings."""
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
