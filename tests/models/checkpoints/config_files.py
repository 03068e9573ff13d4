"""Configurations as published checkpoints write them."""

import json
from pathlib import Path

from models.checkpoints.loader import read_config
from models.config import ModelConfig

# As published checkpoints write it: no head_dim, no nested rotary settings, torch_dtype.
LLAMA_V4: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
    "vocab_size": 259,
}
GPT2_V4: dict[str, object] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "eos_token_id": 258,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 128,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 128,
    "task_specific_params": {"text-generation": {"do_sample": True}},
    "vocab_size": 259,
}


def parse(directory: Path, fields: dict[str, object]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return read_config(directory)
