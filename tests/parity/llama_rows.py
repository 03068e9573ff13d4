"""Rows of Llama and its closest relatives, with every scaling of the rotary embedding."""

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests.parity.row import (
    BIASES,
    EPS,
    GROUPED,
    LONGROPE,
    MLP_BIAS,
    PLAIN,
    QK_NORM,
    ROPE,
    ROPE_SCALING,
    SCALE,
    WINDOWS,
    Row,
    heads,
    model,
    reversed_layers,
    scaled,
    scaling,
)

ROWS: tuple[Row, ...] = (
    Row("llama, multi-head", lambda: LlamaConfig(**PLAIN, rms_norm_eps=0.05), ROPE | SCALE | EPS),
    Row("llama, wide heads", lambda: LlamaConfig(**GROUPED, head_dim=24), SCALE),
    Row(
        "llama, multi-query, biases",
        lambda: LlamaConfig(
            **PLAIN | {"num_key_value_heads": 1}, attention_bias=True, mlp_bias=True
        ),
        BIASES | MLP_BIAS,
    ),
    Row(
        "llama, tied embeddings",
        lambda: LlamaConfig(**GROUPED | {"tie_word_embeddings": True}),
        ROPE,
    ),
    Row(
        "llama, untied embeddings",
        lambda: LlamaConfig(**GROUPED),
        {"lm head": model(tie_word_embeddings=True)},
    ),
    Row(
        "llama, linear scaling",
        lambda: LlamaConfig(**GROUPED, **scaled("linear", factor=4.0)),
        ROPE_SCALING,
    ),
    Row(
        "llama, dynamic scaling",
        lambda: LlamaConfig(
            **GROUPED | {"max_position_embeddings": 16}, **scaled("dynamic", factor=4.0)
        ),
        ROPE_SCALING,
    ),
    Row(
        "llama, llama3 scaling",
        lambda: LlamaConfig(
            **GROUPED, **scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
        ),
        ROPE_SCALING,
    ),
    Row(
        "llama, yarn scaling",
        lambda: LlamaConfig(
            **GROUPED, **scaled("yarn", factor=4.0, original_max_position_embeddings=64)
        ),
        ROPE_SCALING
        | {
            "attention factor": scaling(attention_factor=1.0),
            "rounded bounds of yarn": scaling(truncate=False),
        },
    ),
    Row(
        "llama, yarn scaling with two mscales",
        lambda: LlamaConfig(
            **GROUPED, **scaled("yarn", factor=4.0, mscale=2.0, mscale_all_dim=0.5)
        ),
        {"attention factor": scaling(attention_factor=1.0)},
    ),
    Row(
        "llama, longrope",
        lambda: LlamaConfig(**GROUPED, **LONGROPE),
        ROPE_SCALING,
        # Where the factors change, Llama in transformers goes on with keys rotated by the old
        # ones if it has a cache; Phi-3 computes them again, and so does this engine.
        cached=False,
    ),
    Row("mistral", lambda: MistralConfig(**GROUPED, sliding_window=4), WINDOWS),
    Row(
        "mistral, no window",
        lambda: MistralConfig(**GROUPED, sliding_window=None),
        {"absence of a window": heads(window=4)},
    ),
    Row(
        "qwen2",
        lambda: Qwen2Config(
            **GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1
        ),
        WINDOWS | {"window of the right layer": reversed_layers, "qkv bias": BIASES["qkv bias"]},
    ),
    Row(
        "qwen2, windows switched off",
        lambda: Qwen2Config(**GROUPED, sliding_window=4, max_window_layers=0),
        {"absence of a window": heads(window=4)},
    ),
    Row("qwen3", lambda: Qwen3Config(**GROUPED, head_dim=24), QK_NORM),
    Row(
        "qwen3, biases and layer types",
        lambda: Qwen3Config(
            **GROUPED,
            head_dim=16,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        QK_NORM | WINDOWS | BIASES | {"window of the right layer": reversed_layers},
    ),
)
