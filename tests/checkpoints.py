"""Tiny checkpoints made by transformers, every parameter random, so that each feature bites."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from models.tokenizer import Tokenizer as HeadroomTokenizer

VOCAB_SIZE = 259
LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_positions": 128,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def llama(num_kv_heads: int = 2, **changes: object) -> PreTrainedModel:
    config = LlamaConfig(**{**LLAMA, "num_key_value_heads": num_kv_heads, **changes})
    return randomise(LlamaForCausalLM(config))


def gpt2(**changes: object) -> PreTrainedModel:
    return randomise(GPT2LMHeadModel(GPT2Config(**{**GPT2, **changes})))


def randomise(
    model: PreTrainedModel, *, seed: int = 1, attention: str = "eager"
) -> PreTrainedModel:
    """Random biases and norms too, and projections large enough for sharp attention patterns."""
    generator = torch.Generator().manual_seed(seed)
    # Gemma multiplies by 1 + weight.
    unit = 0.0 if model.config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = ("norm" in name.lower() or "ln_" in name) and name.endswith("weight")
            if is_norm:
                parameter.normal_(unit, 0.2, generator=generator)
            elif name.endswith("sinks"):
                parameter.normal_(0.0, 1.0, generator=generator)
            else:
                std = 0.2 if parameter.ndim == 1 else 0.15
                parameter.normal_(0.0, std, generator=generator)
    # Endings are tested on their own; here generations should be long.
    if model.can_generate():
        model.generation_config.eos_token_id = None
    model.config._attn_implementation = attention
    return model.eval()


def byte_tokenizer() -> Tokenizer:
    """One token per byte, plus <bos>, <eos> and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    return tokenizer


def headroom_byte_tokenizer() -> HeadroomTokenizer:
    return HeadroomTokenizer(byte_tokenizer())


def save(model: PreTrainedModel, path: Path, **options: object) -> Path:
    """Write a whole checkpoint directory: weights, configuration, tokenizer."""
    model.save_pretrained(path, **options)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path
