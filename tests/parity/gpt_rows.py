"""Rows of the families with plain feed-forward blocks."""

from transformers import (
    BertConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoXConfig,
    OPTConfig,
    PhiConfig,
)

from tests.parity.row import (
    BIASES,
    EPS,
    GELU,
    GELU_TANH,
    GPT,
    LONG,
    MLP_BIAS,
    PARTIAL_ROPE,
    PLAIN,
    POSITIONS,
    SCALE,
    Row,
    heads,
    model,
    rope,
)

ROWS: tuple[Row, ...] = (
    Row(
        "phi",
        lambda: PhiConfig(**PLAIN),
        PARTIAL_ROPE | BIASES | MLP_BIAS | GELU_TANH | {"lm head bias": model(lm_head_bias=False)},
    ),
    Row("gpt2", lambda: GPT2Config(**GPT), POSITIONS | BIASES | MLP_BIAS | GELU_TANH),
    Row(
        "gpt2, scores shrink with depth",
        lambda: GPT2Config(**GPT, scale_attn_by_inverse_layer_idx=True),
        {"scale by layer": heads(scale=None)},
    ),
    Row(
        "gpt2, reordered and upcast, relu, wide",
        lambda: GPT2Config(
            **GPT,
            reorder_and_upcast_attn=True,
            scale_attn_by_inverse_layer_idx=True,
            n_inner=80,
            activation_function="relu",
        ),
        {"relu": model(activation="gelu"), "scale by layer": heads(scale=None)},
    ),
    Row(
        "gpt2, unscaled, untied",
        lambda: GPT2Config(**GPT, scale_attn_weights=False, tie_word_embeddings=False),
        {"absence of a scale": heads(scale=None), "lm head": model(tie_word_embeddings=True)},
    ),
    Row("gpt_bigcode, multi-query", lambda: GPTBigCodeConfig(**GPT), POSITIONS | BIASES | SCALE),
    Row(
        "gpt_bigcode, multi-head",
        lambda: GPTBigCodeConfig(**GPT, multi_query=False),
        POSITIONS | BIASES | SCALE,
    ),
    Row(
        "gpt_neox",
        lambda: GPTNeoXConfig(**PLAIN, rotary_pct=0.5, layer_norm_eps=0.05),
        PARTIAL_ROPE | BIASES | MLP_BIAS | EPS | GELU | {"parallel": model(parallel=False)},
    ),
    Row(
        "gpt_neox, sequential, no biases",
        lambda: GPTNeoXConfig(**PLAIN, use_parallel_residual=False, attention_bias=False),
        PARTIAL_ROPE | {"sequence": model(parallel=True)},
    ),
    Row(
        "gptj",
        lambda: GPTJConfig(**GPT, rotary_dim=8),
        PARTIAL_ROPE
        | MLP_BIAS
        | {
            "interleaved rotation": rope(interleaved=False),
            "lm head bias": model(lm_head_bias=False),
        },
    ),
    Row(
        "opt",
        lambda: OPTConfig(**LONG, ffn_dim=96, word_embed_proj_dim=64),
        POSITIONS
        | BIASES
        | MLP_BIAS
        | {"position offset": model(position_offset=0), "final norm": model(final_norm=False)},
    ),
    Row(
        "opt, norms behind, narrow embeddings",
        lambda: OPTConfig(**LONG, ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False),
        {"position offset": model(position_offset=0), "norms behind": model(residual="pre_norm")},
    ),
    Row(
        "opt, no biases, no final norm",
        lambda: OPTConfig(**LONG, ffn_dim=96, enable_bias=False, _remove_final_layer_norm=True),
        POSITIONS,
    ),
    Row(
        "bert",
        lambda: BertConfig(**PLAIN | {"tie_word_embeddings": True}, layer_norm_eps=0.05),
        POSITIONS
        | BIASES
        | MLP_BIAS
        | EPS
        | GELU
        | {
            "token types": model(num_token_types=0),
            "embedding norm": model(embedding_norm=False),
            "norms behind": model(residual="pre_norm"),
            "sight of later tokens": heads(causal=True),
        },
    ),
)
