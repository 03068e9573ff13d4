"""A model to a Hugging Face directory that this project and transformers load alike."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families import FAMILIES
from models.checkpoints.head_overrides import parse_layers
from models.checkpoints.names import find_pieces
from models.config import HeadConfig, ModelConfig
from models.errors import ConfigError
from models.transformer import Transformer

_ACTIVATION_NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


def save_model(
    model: Transformer, path: str | Path, *, stored_as: torch.dtype | None = None
) -> None:
    """Write config.json and model.safetensors into a directory, made if it is missing.

    Args:
        stored_as: type of the weights in the file, if another than that of the model, which
            config.json names and loading goes back to.

    Raises:
        ConfigError: the format cannot say what the configuration says; nothing was written.
    """
    directory = Path(path)
    dtype = str(model.dtype).removeprefix("torch.")
    fields = _llama_fields(model.config.replace(dtype=dtype))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    tensors = {
        name: tensor.to(stored_as or model.dtype) for name, tensor in _tensors(model).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _tensors(model: Transformer) -> dict[str, Tensor]:
    """Our parameters under the names, and cut into the pieces, that the family uses."""
    parameters = model.state_dict()
    tensors: dict[str, Tensor] = {}
    names = FAMILIES[model.config.family].names(model.config)
    for name, pieces in find_pieces(model.config, names).items():
        parts = parameters[name].split([piece.shape[0] for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            tensors[piece.name] = piece.to_theirs(part).contiguous()
    return tensors


def _llama_fields(config: ModelConfig) -> dict[str, object]:
    """The config.json that reads as `config`.

    Raises:
        ConfigError: there is none.
    """
    if config.family != "llama":
        raise ConfigError("family", config.family, "llama")
    heads = config.layers[0]
    eos = config.eos_token_ids
    fields: dict[str, object] = {
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
        "rope_theta": heads.rope.theta if heads.rope is not None else None,
        "hidden_act": _ACTIVATION_NAMES.get(config.activation, config.activation),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": list(eos) if len(eos) > 1 else (eos[0] if eos else None),
        "torch_dtype": config.dtype,
    }
    per_layer = {
        str(index): {
            "num_attention_heads": layer.num_heads,
            "num_key_value_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
        }
        for index, layer in enumerate(config.layers)
        if layer != heads
    }
    if per_layer:
        fields["per_layer_config"] = per_layer
    read_back = parse_layers(FAMILIES["llama"].parse, ConfigFields(fields))
    for theirs, ours in zip(read_back.layers, config.layers, strict=True):
        _check_equal(theirs, ours)
    _check_equal(read_back.replace(layers=config.layers, name=config.name), config)
    return fields


def _check_equal(read_back: ModelConfig | HeadConfig, wanted: ModelConfig | HeadConfig) -> None:
    for field in dataclasses.fields(wanted):
        value, allowed = getattr(wanted, field.name), getattr(read_back, field.name)
        if value != allowed:
            raise ConfigError(field.name, value, f"{allowed!r}, which is all the format can say")
