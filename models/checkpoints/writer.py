"""A model to a Hugging Face directory that this project and transformers load alike."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints.config_json import ConfigFields
from models.checkpoints.families import FAMILIES
from models.checkpoints.head_overrides import apply_head_overrides, parse_layers
from models.checkpoints.int8 import int8_fields, scale_name
from models.checkpoints.names import find_pieces
from models.config import HeadConfig, ModelConfig
from models.cpu.linear import WeightDType, round_to_int8
from models.errors import ConfigError
from models.linear import Linear
from models.transformer import Transformer

_ACTIVATION_NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


def save_model(
    model: Transformer,
    path: str | Path,
    *,
    stored_as: torch.dtype | None = None,
    weight_dtype: WeightDType = "auto",
    token_ids: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Write config.json and model.safetensors into a directory, made if it is missing; both or
    none of them. transformers reads it too, unless projections have a rank.

    Args:
        stored_as: type of the weights in the file, if another than that of the model, which
            config.json names and loading goes back to.
        weight_dtype: `int8` rounds the weights of linear layers as serving with it does (see
            `Transformer.pack_weights`); embeddings and output head stay as they are.
        token_ids: fields of config.json that the model does without and others read, such as
            `bos_token_id` and `pad_token_id`.

    Raises:
        ConfigError: the format cannot say what the configuration says.
        OSError, SafetensorError: the directory cannot be written to.
    """
    directory = Path(path)
    dtype = str(model.dtype).removeprefix("torch.")
    fields = _llama_fields(model.config.replace(dtype=dtype)) | dict(token_ids)
    if weight_dtype == "int8":
        fields |= int8_fields()
    tensors = _tensors(model, stored_as or model.dtype, is_int8=weight_dtype == "int8")
    directory.mkdir(parents=True, exist_ok=True)
    files = directory / "model.safetensors", directory / "config.json"
    partial = [file.with_suffix(".partial") for file in files]
    try:
        save_file(tensors, partial[0], metadata={"format": "pt"})
        partial[1].write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        for new, file in zip(partial, files, strict=True):
            new.replace(file)
    finally:
        for new in partial:
            new.unlink(missing_ok=True)


def check_exportable(config: ModelConfig) -> None:
    """Whether `save_model` can say what a configuration says.

    Raises:
        ConfigError: it cannot.
    """
    _llama_fields(config)


def _tensors(model: Transformer, dtype: torch.dtype, *, is_int8: bool) -> dict[str, Tensor]:
    """Our parameters under the names, and cut into the pieces, that the family uses."""
    parameters = model.state_dict()
    tensors: dict[str, Tensor] = {}
    names = FAMILIES[model.config.family].names(model.config)
    for name, pieces in find_pieces(model.config, names).items():
        parts = parameters[name].split([piece.shape[0] for piece in pieces])
        is_rounded = is_int8 and _is_linear_in_layer(model, name)
        for piece, part in zip(pieces, parts, strict=True):
            theirs = piece.to_theirs(part)
            if is_rounded:
                theirs, scale = round_to_int8(theirs)
                tensors[scale_name(piece.name)] = scale[:, None]
            tensors[piece.name] = (theirs if is_rounded else theirs.to(dtype)).contiguous()
    return tensors


def _is_linear_in_layer(model: Transformer, parameter: str) -> bool:
    module, _, kind = parameter.rpartition(".")
    is_linear = isinstance(model.get_submodule(module), Linear)
    return is_linear and kind == "weight" and parameter.startswith("layers.")


def _llama_fields(config: ModelConfig) -> dict[str, object]:
    """The config.json that reads as `config`.

    Raises:
        ConfigError: there is none.
    """
    if config.family != "llama":
        allowed = "llama, the only format that is written"
        raise ConfigError("family", config.family, allowed)
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
    if config.projection_rank is not None:
        fields["headroom"] = {"projection_rank": config.projection_rank}
    written = ConfigFields(fields)
    read_back = apply_head_overrides(parse_layers(FAMILIES["llama"].parse, written), written)
    for theirs, ours in zip(read_back.layers, config.layers, strict=True):
        _check_equal(theirs, ours)
    _check_equal(read_back.replace(layers=config.layers, name=config.name), config)
    return fields


def _check_equal(read_back: ModelConfig | HeadConfig, wanted: ModelConfig | HeadConfig) -> None:
    for field in dataclasses.fields(wanted):
        value, allowed = getattr(wanted, field.name), getattr(read_back, field.name)
        if value != allowed:
            raise ConfigError(field.name, value, f"{allowed!r}, which is all the format can say")
