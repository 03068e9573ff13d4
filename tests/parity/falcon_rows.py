"""Rows of Falcon and of the families that know positions by linear biases."""

from transformers import BloomConfig, FalconConfig, MptConfig

from tests.parity.row import (
    ALIBI,
    BIASES,
    GELU,
    GELU_TANH,
    LONG,
    MLP_BIAS,
    ROPE,
    SCALE,
    TOKENS,
    Row,
    alibi,
    heads,
    model,
)

ROWS: tuple[Row, ...] = (
    Row("falcon, 7b", lambda: FalconConfig(**LONG), ROPE | GELU | SCALE),
    Row(
        "falcon, multi-head",
        lambda: FalconConfig(**LONG, multi_query=False, parallel_attn=False),
        ROPE | {"sequence": model(parallel=True)},
    ),
    Row(
        "falcon, 40b",
        lambda: FalconConfig(**LONG, new_decoder_architecture=True, num_kv_heads=2),
        ROPE | {"parallel": model(parallel=False)},
    ),
    Row(
        "falcon, 11b",
        lambda: FalconConfig(
            **LONG,
            new_decoder_architecture=True,
            num_kv_heads=2,
            num_ln_in_parallel_attn=1,
            bias=True,
        ),
        ROPE | BIASES | MLP_BIAS,
    ),
    Row(
        "falcon, refined web",
        lambda: FalconConfig(
            **LONG | {"max_position_embeddings": 512},
            alibi=True,
            multi_query=False,
            parallel_attn=False,
            bias=True,
        ),
        ALIBI
        | {
            "bias before the scale": alibi(before_scale=False),
            "bfloat16 bias": alibi(bfloat16=False),
        },
        lengths=(1, 3, 17, 40, 300),
        # Eager attention of transformers 5.23 adds the bias of this model twice.
        attention="sdpa",
    ),
    Row(
        "falcon, refined web, 6 heads",
        lambda: FalconConfig(
            **LONG | {"hidden_size": 96, "num_attention_heads": 6},
            alibi=True,
            multi_query=False,
            parallel_attn=False,
            bias=True,
        ),
        ALIBI,
        attention="sdpa",
    ),
    Row(
        "bloom",
        lambda: BloomConfig(**TOKENS, hidden_size=64, n_layer=2, n_head=4),
        ALIBI | BIASES | MLP_BIAS | GELU_TANH | {"embedding norm": model(embedding_norm=False)},
    ),
    Row(
        "bloom, 6 heads",
        lambda: BloomConfig(**TOKENS, hidden_size=96, n_layer=2, n_head=6),
        ALIBI,
    ),
    Row(
        "mpt",
        lambda: MptConfig(
            **TOKENS,
            d_model=64,
            n_layers=2,
            n_heads=4,
            max_seq_len=64,
            attn_config={"alibi": True, "clip_qkv": 1.0},
        ),
        ALIBI | GELU | {"clip_qkv": heads(clip_qkv=None)},
    ),
    Row(
        "mpt, 6 heads, own scale",
        lambda: MptConfig(
            **TOKENS,
            d_model=96,
            n_layers=2,
            n_heads=6,
            max_seq_len=64,
            attn_config={"alibi": True, "softmax_scale": 0.4},
        ),
        ALIBI | {"softmax_scale": heads(scale=None)},
    ),
)
