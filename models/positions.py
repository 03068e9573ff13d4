"""How a model knows where a token stands, as numbers: rotary settings and linear biases."""

import math
from dataclasses import dataclass
from typing import TypeAlias

from models.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions are divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicNtkScaling:
    """The base grows with the length of the sequence beyond `original_length`."""

    factor: float
    original_length: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Slow rotations are interpolated, fast ones kept (Peng et al. 2023).

    Attributes:
        beta_fast, beta_slow: turns within the original length that bound the ramp between both.
        attention_factor: factor on cosines and sines.
        truncate: round the bounds of the ramp to whole dimensions.
    """

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Wavelengths beyond `original_length / low_freq_factor` are stretched (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """A divisor for every frequency, of two lists: for short and for long sequences
    (Ding et al. 2024).

    Attributes:
        original_length: longer sequences use `long_factor`, from their first token on.
        attention_factor: factor on cosines and sines.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    attention_factor: float


RopeScaling: TypeAlias = (
    LinearScaling | DynamicNtkScaling | YarnScaling | Llama3Scaling | LongRopeScaling
)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of one layer (Su et al. 2021).

    Attributes:
        theta: the base.
        rotary_dim: the first so many dimensions of a head are rotated.
        interleaved: pairs are (2i, 2i + 1) as in GPT-J, instead of (i, i + rotary_dim / 2).
        scaling: for contexts longer than the model was first trained with.
    """

    theta: float
    rotary_dim: int
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if not 0 < self.theta < math.inf:
            raise ConfigError("rope_theta", self.theta, "more than 0")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError("rotary_dim", self.rotary_dim, "an even number, 2 or more")
        scaling = self.scaling
        if isinstance(scaling, LongRopeScaling):
            for name in ("short_factor", "long_factor"):
                given = getattr(scaling, name)
                if len(given) != self.rotary_dim // 2 or not all(f > 0 for f in given):
                    raise ConfigError(
                        name,
                        f"{len(given)} numbers",
                        f"{self.rotary_dim // 2} numbers above 0, one for each rotated pair",
                    )
        elif scaling is not None and not 0 < scaling.factor < math.inf:
            raise ConfigError("rope_scaling.factor", scaling.factor, "more than 0")
        if isinstance(scaling, DynamicNtkScaling) and (scaling.factor < 1 or self.rotary_dim == 2):
            raise ConfigError(
                "rope_scaling.factor", scaling.factor, "1 or more, with a rotary_dim above 2"
            )

    @property
    def depends_on_length(self) -> bool:
        """Whether the rotation of a position depends on how long its sequence is."""
        return isinstance(self.scaling, DynamicNtkScaling | LongRopeScaling)

    @property
    def switch_length(self) -> int | None:
        """Beyond this length of its sequence, every position is rotated differently."""
        scaling = self.scaling
        return scaling.original_length if isinstance(scaling, LongRopeScaling) else None


@dataclass(frozen=True, slots=True)
class Alibi:
    """Attention with linear biases (Press et al. 2022): `slope * key position` is added to scores.

    Adding the key's position instead of minus its distance changes every score of a query by the
    same number, which the softmax does not see.

    Attributes:
        slopes: one for each query head.
        before_scale: the bias is added before the scores are scaled (Falcon).
        bfloat16: slopes and biases are rounded to bfloat16, whatever the model computes in
            (Falcon); whole positions above 256 are then no longer distinct.
    """

    slopes: tuple[float, ...]
    before_scale: bool = False
    bfloat16: bool = False


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Slopes of BLOOM and Falcon: powers of two; beyond a power of two heads, every other slope
    of twice as many."""
    whole = 2 ** math.floor(math.log2(num_heads))
    base = 2.0 ** -(2.0 ** -(math.log2(whole) - 3))
    extra_base = 2.0 ** -(2.0 ** -(math.log2(2 * whole) - 3))
    return tuple(base ** (i + 1) for i in range(whole)) + tuple(
        extra_base ** (2 * i + 1) for i in range(num_heads - whole)
    )


def mpt_alibi_slopes(num_heads: int, bias_max: float) -> tuple[float, ...]:
    """Slopes of MPT: from the next power of two heads, every second one first."""
    whole = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2.0 ** -((i + 1) * bias_max / whole) for i in range(whole)]
    if whole != num_heads:
        slopes = (slopes[1::2] + slopes[::2])[:num_heads]
    return tuple(slopes)
