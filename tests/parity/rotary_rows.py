"""Rows of the other families with gated feed-forward blocks and rotary embeddings."""

from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    GraniteConfig,
    Olmo2Config,
    Phi3Config,
    StableLmConfig,
)

from tests.parity.row import (
    BIASES,
    EPS,
    GELU_TANH,
    GROUPED,
    LONGROPE,
    MLP_BIAS,
    PARTIAL_ROPE,
    QK_NORM,
    ROPE_SCALING,
    WINDOWS,
    Row,
    heads,
    model,
    one_rope,
    reversed_layers,
    rope,
    scaled,
    scaling,
)

WIDE = {"head_dim": 32, "sliding_window": 4, "query_pre_attn_scalar": 17}
GEMMA = {
    "norm weights of 1 + w": model(norm_unit_offset=False),
    "embedding scale": model(embedding_scale=1.0),
}

ROWS: tuple[Row, ...] = (
    Row(
        "gemma",
        lambda: GemmaConfig(**GROUPED | {"tie_word_embeddings": True}, head_dim=32),
        GEMMA | GELU_TANH,
    ),
    Row(
        "gemma2",
        lambda: Gemma2Config(
            **GROUPED | {"tie_word_embeddings": True},
            **WIDE,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
        GEMMA
        | WINDOWS
        | {
            "window of the right layer": reversed_layers,
            "softcap": heads(softcap=None),
            "logit softcap": model(logit_softcap=None),
            "query_pre_attn_scalar": heads(scale=None),
            "norms behind": model(residual="pre_norm"),
        },
    ),
    Row(
        "gemma2, no softcaps, biases",
        lambda: Gemma2Config(
            **GROUPED,
            **WIDE,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
        ),
        BIASES | {"absence of a softcap": heads(softcap=2.0)},
    ),
    Row(
        "gemma3_text",
        lambda: Gemma3TextConfig(
            **GROUPED | {"num_hidden_layers": 3, "tie_word_embeddings": True},
            **WIDE,
            sliding_window_pattern=3,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
            },
        ),
        GEMMA
        | WINDOWS
        | QK_NORM
        | ROPE_SCALING
        | {
            "window of the right layer": reversed_layers,
            "two rotary bases": one_rope,
            "query_pre_attn_scalar": heads(scale=None),
        },
    ),
    Row(
        "phi3, short and long factors",
        lambda: Phi3Config(**GROUPED, **LONGROPE, original_max_position_embeddings=16),
        ROPE_SCALING
        | {
            "switch of the factors": scaling(original_length=64),
            "attention factor": scaling(attention_factor=1.0),
        },
    ),
    Row(
        "phi3, window, partial rotation",
        lambda: Phi3Config(**GROUPED, sliding_window=4, partial_rotary_factor=0.5),
        WINDOWS | PARTIAL_ROPE,
    ),
    Row(
        "stablelm",
        lambda: StableLmConfig(
            **GROUPED, qk_layernorm=True, use_parallel_residual=True, use_qkv_bias=True
        ),
        PARTIAL_ROPE | QK_NORM | {"qkv bias": BIASES["qkv bias"]},
    ),
    Row(
        "stablelm, sequential",
        lambda: StableLmConfig(**GROUPED, layer_norm_eps=0.05, partial_rotary_factor=0.5),
        PARTIAL_ROPE | EPS | {"sequence": model(parallel=True)},
    ),
    Row(
        "olmo2",
        lambda: Olmo2Config(**GROUPED),
        QK_NORM | {"norms behind": model(residual="pre_norm")},
    ),
    Row("olmo2, biases", lambda: Olmo2Config(**GROUPED, attention_bias=True), BIASES),
    Row(
        "cohere",
        lambda: CohereConfig(
            **GROUPED | {"tie_word_embeddings": True}, use_qk_norm=True, logit_scale=0.7
        ),
        QK_NORM
        | {"interleaved rotation": rope(interleaved=False), "logit scale": model(logit_scale=1.0)},
    ),
    Row(
        "cohere, biases, no qk norm",
        lambda: CohereConfig(**GROUPED, attention_bias=True, logit_scale=0.7),
        BIASES | {"interleaved rotation": rope(interleaved=False)},
    ),
    Row(
        "granite",
        lambda: GraniteConfig(
            **GROUPED,
            attention_multiplier=0.3,
            embedding_multiplier=3.3,
            residual_multiplier=0.6,
            logits_scaling=0.7,
        ),
        {
            "attention_multiplier": heads(scale=None),
            "embedding_multiplier": model(embedding_scale=1.0),
            "residual_multiplier": model(residual_scale=1.0),
            "logits_scaling": model(logit_scale=1.0),
        },
    ),
    Row(
        "granite, biases",
        lambda: GraniteConfig(
            **GROUPED, attention_multiplier=0.3, attention_bias=True, mlp_bias=True
        ),
        BIASES | MLP_BIAS,
    ),
    Row(
        "gpt_oss",
        lambda: GptOssConfig(
            **GROUPED | {"intermediate_size": 32},
            head_dim=16,
            sliding_window=4,
            num_local_experts=4,
            num_experts_per_tok=2,
            swiglu_limit=1.0,
            **scaled(
                "yarn",
                rope_theta=1.5e5,
                factor=4.0,
                truncate=False,
                original_max_position_embeddings=256,
            ),
        ),
        WINDOWS
        | BIASES
        | ROPE_SCALING
        | {
            "window of the right layer": reversed_layers,
            "sinks": heads(learned_sinks=False),
            "exact bounds of yarn": scaling(truncate=True),
            "attention factor": scaling(attention_factor=1.0),
            "swiglu_limit": model(swiglu_limit=7.0),
            "experts per token": model(num_experts_per_token=1),
        },
    ),
)
