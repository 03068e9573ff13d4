"""The shape of a model. Knows every number that the tensors depend on; knows no tensor."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from models.errors import ConfigError
from models.positions import Alibi, RopeConfig

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu"]
AttentionKind: TypeAlias = Literal["mha", "gqa", "mqa"]
DTypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]
NormKind: TypeAlias = Literal["rms_norm", "layer_norm"]
Residual: TypeAlias = Literal["pre_norm", "post_norm", "sandwich_norm", "output_norm"]

KVCacheDType: TypeAlias = Literal["auto", "int8"]

# Longer than any sequence; positions are compared as 64-bit numbers.
MAX_WINDOW = 2**31 - 1
ITEMSIZE: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# A float32 for each key and each value of 8 bits.
KV_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class QKNorm:
    """Normalisation of queries and keys before they are rotated (Henry et al. 2020).

    Attributes:
        scope: what one norm spans: a head with weights that all heads share (`head`, Qwen3), a
            head with weights of its own (`each_head`, StableLM, Cohere), or all heads together
            (`all_heads`, OLMo2).
        unit_offset: multiply by `1 + weight` (Gemma).
    """

    norm: NormKind
    scope: Literal["head", "each_head", "all_heads"]
    eps: float
    unit_offset: bool = False


@dataclass(frozen=True, slots=True)
class Retention:
    """Which past tokens a key/value head has to remember.

    Attributes:
        window: the newest so many, the current one included; None is all.
        sink_tokens: the first so many in any case.
    """

    window: int | None = None
    sink_tokens: int = 0


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
        window: a query sees so many keys, its own included; one number for all heads, or one for
            each query head; None is all.
        sink_tokens: the first tokens of a sequence, seen from outside of the window too
            (Xiao et al. 2023).
        learned_sinks: each query head has a learned logit that takes part in the softmax and
            contributes no value (gpt-oss).
        softcap: scores become `softcap * tanh(scores / softcap)` before the mask (Gemma 2).
        temperature: a further factor on the scores of each query head.
        rope: how queries and keys are rotated; None leaves them as they are.
        alibi: linear position bias of each query head (Press et al. 2022).
        qk_norm: normalisation of queries and keys; None is none.
        clip_qkv: queries, keys and values are clamped to plus or minus this (MPT).
        causal: a query sees no later key.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float | None = None
    window: int | tuple[int | None, ...] | None = None
    sink_tokens: int = 0
    learned_sinks: bool = False
    softcap: float | None = None
    temperature: tuple[float, ...] | None = None
    rope: RopeConfig | None = None
    alibi: Alibi | None = None
    qk_norm: QKNorm | None = None
    clip_qkv: float | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        for field in ("num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads={self.num_heads}"
            )
        if isinstance(self.window, tuple) and len(self.window) != self.num_heads:
            raise ConfigError(
                "window", f"{len(self.window)} windows", f"one for each of {self.num_heads} heads"
            )
        for window in self.windows:
            if window is not None and not 1 <= window <= MAX_WINDOW:
                raise ConfigError("window", window, f"1 to {MAX_WINDOW}")
        if not 0 < self.softmax_scale < math.inf:
            raise ConfigError("scale", self.scale, "a finite number above 0")
        if self.sink_tokens < 0:
            raise ConfigError("sink_tokens", self.sink_tokens, "0 or more")
        for field in ("softcap", "clip_qkv"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(field, value, "a finite number above 0")
        if self.temperature is not None:
            if len(self.temperature) != self.num_heads:
                raise ConfigError(
                    "temperature",
                    f"{len(self.temperature)} numbers",
                    f"one for each of {self.num_heads} heads",
                )
            if not all(math.isfinite(value) for value in self.temperature):
                raise ConfigError("temperature", self.temperature, "finite numbers")
        if self.alibi is not None and len(self.alibi.slopes) != self.num_heads:
            raise ConfigError(
                "alibi",
                f"{len(self.alibi.slopes)} slopes",
                f"one for each of {self.num_heads} heads",
            )
        if self.rope is not None and not 0 < self.rope.rotary_dim <= self.head_dim:
            raise ConfigError("rotary_dim", self.rope.rotary_dim, f"1 to head_dim={self.head_dim}")

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
    def windows(self) -> tuple[int | None, ...]:
        """The window of each query head."""
        if isinstance(self.window, tuple):
            return self.window
        return (self.window,) * self.num_heads

    @property
    def retentions(self) -> dict[Retention, tuple[int, ...]]:
        """The key/value heads by what they have to remember: the longest window of their group."""
        return dict(_retentions(self.windows, self.num_kv_heads, self.sink_tokens))

    @property
    def label(self) -> str:
        """Short name used in logs, metrics and reports, for example `h12kv4d64` or, with a window
        of 512 tokens, `h12kv4d64w512`."""
        base = f"h{self.num_heads}kv{self.num_kv_heads}d{self.head_dim}"
        if self.window is None:
            return base
        windows = dict.fromkeys("all" if w is None else str(w) for w in self.windows)
        return f"{base}w{'/'.join(windows)}"


@functools.lru_cache(maxsize=256)
def _retentions(
    windows: tuple[int | None, ...], num_kv_heads: int, sink_tokens: int
) -> tuple[tuple[Retention, tuple[int, ...]], ...]:
    groups: dict[Retention, list[int]] = {}
    size = len(windows) // num_kv_heads
    for kv_head in range(num_kv_heads):
        group = windows[kv_head * size : (kv_head + 1) * size]
        finite = [window for window in group if window is not None]
        retention = Retention(max(finite), sink_tokens) if len(finite) == size else Retention()
        groups.setdefault(retention, []).append(kv_head)
    return tuple((retention, tuple(kv_heads)) for retention, kv_heads in groups.items())


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A transformer: a causal decoder, or an encoder when its heads are not causal.

    Attributes:
        layers: the head configuration of each layer; layers may differ.
        max_position_embeddings: tokens of the longest sequence.
        norm, norm_eps: every norm of the model, except that of queries and keys.
        norm_bias: whether layer norms add a bias.
        norm_unit_offset: norms multiply by `1 + weight` (Gemma).
        residual: where a layer normalises, for a sub-layer `f`: `pre_norm` is `x + f(norm(x))`,
            `post_norm` is `norm(x + f(x))` (BERT), `sandwich_norm` is `x + norm(f(norm(x)))`
            (Gemma 2), `output_norm` is `x + norm(f(x))` (OLMo2).
        parallel: attention and feed-forward block read the same input and are added together.
        shared_norm: in parallel layers, both read the output of one norm.
        final_norm: whether a norm follows the last layer.
        gated_mlp: `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        num_experts, num_experts_per_token: mixture of experts (gpt-oss); 0 is one plain block.
        swiglu_limit: the clamp of gpt-oss' gated activation.
        learned_positions: rows of a position table that are added to the embeddings; 0 is none.
        position_offset: the row of the first position (2 in OPT).
        num_token_types: rows of a token type table, of which row 0 is added (BERT).
        embedding_size: width of the token embeddings; None is `hidden_size`, another width is
            projected (OPT).
        embedding_norm: embeddings are normalised (BLOOM, BERT).
        embedding_scale: factor on the token embeddings.
        residual_scale: factor on what each sub-layer adds (Granite).
        logit_scale: factor on the logits (Cohere, Granite).
        logit_softcap: logits become `c * tanh(logits / c)` (Gemma 2).
        lm_head_bias: whether the projection to the vocabulary adds a bias (GPT-J).
        projection_rank: rank of the projections of attention and feed-forward blocks, each of
            which is two matrices; None is one.
        eos_token_ids: any of these ends a generation.
        kv_cache_dtype: `int8` keeps keys and values as 8 bits, with a scale for each head and
            token; `auto` keeps them in `dtype`.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[HeadConfig, ...]
    max_position_embeddings: int
    norm: NormKind
    norm_eps: float
    activation: Activation
    gated_mlp: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    norm_bias: bool = True
    norm_unit_offset: bool = False
    residual: Residual = "pre_norm"
    parallel: bool = False
    shared_norm: bool = False
    final_norm: bool = True
    num_experts: int = 0
    num_experts_per_token: int = 0
    swiglu_limit: float | None = None
    learned_positions: int = 0
    position_offset: int = 0
    num_token_types: int = 0
    embedding_size: int | None = None
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    lm_head_bias: bool = False
    projection_rank: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: DTypeName = "float32"
    kv_cache_dtype: KVCacheDType = "auto"
    name: str = "model"

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "1 or more")
        if self.projection_rank is not None and self.projection_rank < 1:
            raise ConfigError("projection_rank", self.projection_rank, "1 or more")
        if not 0 <= self.norm_eps < math.inf:
            raise ConfigError("norm_eps", self.norm_eps, "a finite number, 0 or more")
        if not self.layers:
            raise ConfigError("layers", self.layers, "at least one layer")
        if len({heads.causal for heads in self.layers}) > 1:
            raise ConfigError("causal", "different", "the same in every layer")
        if self.learned_positions:
            longest = self.learned_positions - self.position_offset
            if self.max_position_embeddings > longest:
                raise ConfigError(
                    "max_position_embeddings", self.max_position_embeddings, f"at most {longest}"
                )
        if self.kv_cache_dtype not in get_args(KVCacheDType):
            raise ConfigError("kv_cache_dtype", self.kv_cache_dtype, "auto, int8")
        if self.kv_cache_dtype == "int8":
            for heads in self.layers:
                if heads.head_dim % KV_SCALE_BYTES:  # scales lie behind, where floats can lie
                    raise ConfigError(
                        "kv_cache_dtype",
                        "int8",
                        f"auto, because head_dim is {heads.head_dim}, no multiple of "
                        f"{KV_SCALE_BYTES}",
                    )
        for token_id in self.eos_token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ConfigError("eos_token_id", token_id, f"0 to {self.vocab_size - 1}")

    def retentions(self, layer: int) -> dict[Retention, tuple[int, ...]]:
        """`HeadConfig.retentions`, where a window that no sequence outgrows is none."""
        found: dict[Retention, tuple[int, ...]] = {}
        for retention, kv_heads in self.layers[layer].retentions.items():
            window = retention.window
            if window is not None and window >= self.max_position_embeddings:
                retention = Retention()
            found[retention] = tuple(sorted((*found.get(retention, ()), *kv_heads)))
        return found

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def is_causal(self) -> bool:
        """True for a decoder, which can generate; False for an encoder, which can embed."""
        return self.layers[0].causal

    @property
    def head_label(self) -> str:
        """`h12kv4d64` when all layers agree, else the distinct ones joined by `+`."""
        return "+".join(dict.fromkeys(heads.label for heads in self.layers))

    @property
    def rope_depends_on_length(self) -> bool:
        """Whether equal tokens at equal positions can have different keys in different requests."""
        return any(heads.rope is not None and heads.rope.depends_on_length for heads in self.layers)

    @property
    def rope_switch_length(self) -> int | None:
        """Sequences longer than this are rotated differently from their first token on."""
        lengths = [
            heads.rope.switch_length
            for heads in self.layers
            if heads.rope is not None and heads.rope.switch_length is not None
        ]
        return min(lengths, default=None)

    @property
    def kv_itemsize(self) -> int:
        """Bytes of an element of the key/value cache."""
        return 1 if self.kv_cache_dtype == "int8" else ITEMSIZE[self.dtype]

    def kv_row_elements(self, heads: HeadConfig) -> int:
        """Elements of the cache that the key, or the value, of one head and token takes."""
        return heads.head_dim + (KV_SCALE_BYTES if self.kv_cache_dtype == "int8" else 0)

    def kv_row_bytes(self, heads: HeadConfig) -> int:
        """The same in bytes."""
        return self.kv_row_elements(heads) * self.kv_itemsize

    def kv_bytes_per_token(self) -> int:
        """Bytes of key/value cache that one token takes over all layers, before it leaves the
        window of any head."""
        return sum(2 * heads.num_kv_heads * self.kv_row_bytes(heads) for heads in self.layers)

    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes of key/value cache that the next token of a sequence reads: for each key/value
        head all `num_tokens`, or those in its window and its sink tokens."""
        num_bytes = 0
        for index, heads in enumerate(self.layers):
            for retention, kv_heads in self.retentions(index).items():
                kept = num_tokens
                if retention.window is not None:
                    kept = min(num_tokens, retention.window + retention.sink_tokens)
                num_bytes += 2 * len(kv_heads) * self.kv_row_bytes(heads) * kept
        return num_bytes

    def replace(self, **changes: object) -> "ModelConfig":
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
