"""A Hugging Face directory to a model, with every disagreement named before anything is used."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.checkpoints.bundled import BUNDLED_MODELS, model_name
from models.checkpoints.config_json import ConfigFields, read_json
from models.checkpoints.families import FAMILIES
from models.checkpoints.families.family import Family
from models.checkpoints.head_overrides import apply_head_overrides, parse_layers
from models.checkpoints.int8 import has_int8_weights, read_int8, scale_name
from models.checkpoints.names import Piece, find_pieces
from models.config import ModelConfig
from models.errors import CheckpointError, ConfigError
from models.kernels import KernelName
from models.transformer import Transformer

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_NAMED = 8
# Fields that change what some family computes; the others have to say so, not to pass them over.
_FEATURES = (
    "alibi", "attention_chunk_size", "attention_multiplier", "attn_logit_softcapping", "clip_qkv",
    "embedding_multiplier",
    "final_logit_softcapping", "layer_types", "logit_scale", "logits_scaling", "multi_query",
    "no_rope_layers", "num_local_experts", "parallel_attn",
    "qk_layernorm", "query_pre_attn_scalar", "residual_multiplier", "sliding_window",
    "rope_interleaved", "rope_local_base_freq", "rotary_dim", "rotary_pct",
    "use_parallel_residual", "use_qk_norm", "use_sliding_window",
)  # fmt: skip


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of the model in a directory.

    Raises:
        CheckpointError: config.json is missing or unreadable.
        ConfigError: a field is missing, has a value that cannot work, or asks for a feature that
            is not supported.
    """
    directory = _directory(path)
    family, fields = _read_family(directory)
    config = apply_head_overrides(parse_layers(family.parse, fields), fields)
    fields.refuse_unread(*_FEATURES)
    generation = directory / "generation_config.json"
    if generation.exists():
        # A chat model often names its end-of-turn token only here.
        eos = ConfigFields(read_json(generation)).token_ids("eos_token_id")
        config = config.replace(eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *eos))))
    return config.replace(name=model_name(directory))


def check_checkpoint(path: str | Path) -> ModelConfig:
    """Everything that `load_model` checks, from the headers alone; reads no weights.

    Raises:
        CheckpointError, ConfigError: see `load_model`.
    """
    directory = _directory(path)
    config = read_config(directory)
    _find_tensors(directory, config)
    return config


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    kernel: KernelName = "auto",
) -> Transformer:
    """Load a model from a Hugging Face directory (config.json and safetensors).

    Args:
        path: the directory.
        dtype: type of weights and computation; None keeps what config.json says.
        device: None means the CPU.
        kernel: which implementation reads the paged cache.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing, unexpected or
            wrongly shaped; the message names them.
        ConfigError: see `read_config`; or the kernel cannot compute the model's heads here.
    """
    directory = _directory(path)
    config = read_config(directory)
    dtype = dtype or getattr(torch, config.dtype)
    stored = _find_tensors(directory, config)
    handles = {file: safe_open(file, framework="pt") for file in {s.file for s in stored.values()}}

    def read(piece: Piece) -> Tensor:
        place = stored[piece.name]
        tensor: Tensor = handles[place.file].get_tensor(place.name)
        if (scale := stored.get(scale_name(piece.name))) is not None:
            scales = handles[scale.file].get_tensor(scale.name)
            tensor = read_int8(scale.name, tensor, scales)
        return piece.to_ours(tensor)

    with torch.device("meta"):
        model = Transformer(config, kernel=kernel)
    state: dict[str, Tensor] = {}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, pieces in find_pieces(config, FAMILIES[config.family].names(config)).items():
        joined = torch.cat([read(piece) for piece in pieces]).view(shapes[name])
        state[name] = joined.to(device=device or "cpu", dtype=dtype).contiguous()
    model.load_state_dict(state, assign=True)
    _ = model.kernel_name  # refuses a kernel that cannot compute these heads here
    return model.eval().requires_grad_(False)


def _directory(path: str | Path) -> Path:
    directory = Path(path)
    if not directory.is_dir():
        bundled = ", ".join(BUNDLED_MODELS)
        raise CheckpointError(
            f"{directory} is not a directory that holds a model; bundled models are {bundled}"
        )
    return directory


def _read_family(directory: Path) -> tuple[Family, ConfigFields]:
    values = read_json(directory / "config.json")
    fields = ConfigFields(values)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError("model_type", model_type, ", ".join(FAMILIES))
    has_int8_weights(fields)  # refuses all other weights that are not plain floats
    fields.refuse_unless("pruned_heads", {})
    fields.refuse_unless("is_encoder_decoder", False)
    return FAMILIES[model_type], fields


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, from its index if it is sharded.

    Raises:
        CheckpointError: one is missing, or the index cannot be read.
    """
    if not (directory / _INDEX).exists():
        if not (directory / _SINGLE).exists():
            raise CheckpointError(
                f"{directory} holds neither {_SINGLE} nor {_INDEX}; "
                "other weight formats are not read because they can run code"
            )
        return [directory / _SINGLE]
    weight_map = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / _INDEX} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{_INDEX} names a shard outside of the directory: {name!r}")
    files: list[Path] = []
    for name in dict.fromkeys(weight_map.values()):
        if not (directory / name).exists():
            raise CheckpointError(f"{directory / name} is missing; {_INDEX} names it")
        files.append(directory / name)
    return files


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file: which file, its name there, its shape and type."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def _find_tensors(directory: Path, config: ModelConfig) -> dict[str, _Stored]:
    """Where every needed tensor is, by its name without prefix.

    Raises:
        CheckpointError: what the files hold differs from what the configuration needs.
    """
    family, fields = _read_family(directory)
    stored = _read_headers(weight_files(directory), family, config)
    pieces = find_pieces(config, family.names(config)).values()
    expected = {piece.name: piece for parts in pieces for piece in parts}
    if has_int8_weights(fields):
        expected |= _scales(expected, stored)
    problems = [f"missing {name}" for name in expected if name not in stored]
    for name, place in stored.items():
        if name not in expected:
            problems.append(f"unexpected {name}")
        elif place.shape != expected[name].shape:
            problems.append(
                f"{name} has shape {list(place.shape)}, the configuration needs "
                f"{list(expected[name].shape)}"
            )
        elif place.dtype not in ("F32", "F16", "BF16") and scale_name(name) not in expected:
            problems.append(f"{name} has dtype {place.dtype}, allowed: F32, F16, BF16")
    if problems:
        shown = "; ".join(problems[:_MAX_NAMED])
        more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        raise CheckpointError(
            f"the weights of {config.name!r} do not match its config.json: {shown}{more}"
        )
    return stored


def _scales(weights: dict[str, Piece], stored: dict[str, _Stored]) -> dict[str, Piece]:
    """The scales that matrices of 8 bits need."""
    rows = {
        scale_name(name): piece.shape[0]
        for name, piece in weights.items()
        if name in stored and stored[name].dtype == "I8"
        if len(piece.shape) == 2 and not piece.transposed
    }
    return {name: Piece(name, (count, 1)) for name, count in rows.items()}


def _read_headers(files: list[Path], family: Family, config: ModelConfig) -> dict[str, _Stored]:
    stored: dict[str, _Stored] = {}
    for file in files:
        try:
            # As "np" the file is not mapped: headers of files larger than memory are read too.
            with safe_open(file, framework="np") as handle:
                for stored_name in handle.keys():  # noqa: SIM118, safe_open is no mapping
                    name = _usual_name(stored_name, family)
                    if _is_ignored(name, family, config):
                        continue
                    if name in stored:
                        raise CheckpointError(
                            f"{name} is stored twice, as {stored[name].name} in "
                            f"{stored[name].file} and as {stored_name} in {file}"
                        )
                    view = handle.get_slice(stored_name)
                    shape = tuple(view.get_shape())
                    stored[name] = _Stored(file, stored_name, shape, view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    return stored


def _usual_name(stored_name: str, family: Family) -> str:
    """What most exporters of the family call a tensor, without the prefix."""
    name = stored_name.removeprefix(family.prefix)
    for old, new in family.old_endings:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _is_ignored(name: str, family: Family, config: ModelConfig) -> bool:
    """Whether nothing needs the tensor: a buffer, or a second copy of tied embeddings."""
    if any(fnmatchcase(name, pattern) for pattern in family.ignored):
        return True
    head = family.names(config).model.get("lm_head")
    return config.tie_word_embeddings and head is not None and name == f"{head.names[0]}.weight"
