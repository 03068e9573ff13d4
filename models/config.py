"""The shape of a model. Knows every number that the tensors depend on; knows no tensor."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeAlias

from models.errors import ConfigError

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu"]
AttentionKind: TypeAlias = Literal["mha", "gqa", "mqa"]
DTypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]

ITEMSIZE: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """The heads of one layer.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads; query head `h` reads key/value head
            `h // (num_heads / num_kv_heads)`. Equal to `num_heads` is multi-head, 1 is
            multi-query, between is grouped-query attention (Ainslie et al. 2023).
        head_dim: width of one head.
        scale: factor on the scores before the softmax; None means `head_dim ** -0.5`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float | None = None

    def __post_init__(self) -> None:
        for field in ("num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads={self.num_heads}"
            )

    @property
    def num_queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def kind(self) -> AttentionKind:
        if self.num_kv_heads == self.num_heads:
            return "mha"
        return "mqa" if self.num_kv_heads == 1 else "gqa"

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def label(self) -> str:
        """Short name used in logs, metrics and reports, for example `h12kv4d64`."""
        return f"h{self.num_heads}kv{self.num_kv_heads}d{self.head_dim}"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer with pre-norm blocks.

    Attributes:
        layers: the head configuration of each layer; layers may differ.
        rope_theta: base of the rotary embedding; None means learned positions.
        gated_mlp: `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        eos_token_ids: any of these ends a generation.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[HeadConfig, ...]
    max_position_embeddings: int
    norm: Literal["rms_norm", "layer_norm"]
    norm_eps: float
    activation: Activation
    gated_mlp: bool
    rope_theta: float | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()
    dtype: DTypeName = "float32"
    name: str = "model"

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "1 or more")
        if not self.layers:
            raise ConfigError("layers", self.layers, "at least one layer")
        if self.rope_theta is not None:
            for heads in self.layers:
                if heads.head_dim % 2:
                    raise ConfigError(
                        "head_dim", heads.head_dim, "an even number with rotary positions"
                    )
        for token_id in self.eos_token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ConfigError("eos_token_id", token_id, f"0 to {self.vocab_size - 1}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def head_label(self) -> str:
        """`h12kv4d64` when all layers agree, else the distinct ones joined by `+`."""
        return "+".join(dict.fromkeys(heads.label for heads in self.layers))

    def kv_bytes_per_token(self, dtype: DTypeName | None = None) -> int:
        """Bytes of key/value cache that one token takes over all layers."""
        width = sum(2 * heads.num_kv_heads * heads.head_dim for heads in self.layers)
        return width * ITEMSIZE[dtype or self.dtype]

    def replace(self, **changes: object) -> "ModelConfig":
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
