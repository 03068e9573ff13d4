"""A model to a Hugging Face directory that this project and transformers load alike."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints.families import FAMILIES
from models.config import ModelConfig
from models.errors import ConfigError
from models.transformer import Transformer

_ACTIVATION_NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


def save_model(model: Transformer, path: str | Path) -> None:
    """Write config.json and model.safetensors into a directory, made if it is missing.

    Raises:
        ConfigError: the format cannot say what the configuration says; nothing was written.
    """
    directory = Path(path)
    fields = _llama_fields(model.config)
    directory.mkdir(parents=True, exist_ok=True)
    fields["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    save_file(_tensors(model), directory / "model.safetensors", metadata={"format": "pt"})


def _tensors(model: Transformer) -> dict[str, Tensor]:
    """Our parameters under the names, and cut into the pieces, that the family uses."""
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for name, pieces in FAMILIES[model.config.family].tensors(model.config):
        parts = parameters[name].detach().split([piece.shape[0] for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            tensors[piece.name] = part.contiguous()
    return tensors


def _llama_fields(config: ModelConfig) -> dict[str, object]:
    if config.family != "llama":
        raise ConfigError("family", config.family, "llama")
    if len(set(config.layers)) != 1:
        raise ConfigError("layers", config.head_label, "the same heads in every layer")
    heads = config.layers[0]
    for field, value, allowed in (
        ("scale", heads.scale, None),
        ("norm", config.norm, "rms_norm"),
        ("gated_mlp", config.gated_mlp, True),
        ("output_bias", config.output_bias, config.qkv_bias),
    ):
        if value != allowed:
            raise ConfigError(field, value, repr(allowed))
    if config.rope_theta is None:
        raise ConfigError("rope_theta", None, "a number")
    eos = config.eos_token_ids
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.num_kv_heads,
        "head_dim": heads.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": _ACTIVATION_NAMES.get(config.activation, config.activation),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": list(eos) if len(eos) > 1 else (eos[0] if eos else None),
    }
