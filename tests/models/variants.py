"""Everything that may be added to plain attention, as one description for code and oracle."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from models.positions import Alibi, alibi_slopes, mpt_alibi_slopes
from models.scoring import Scoring
from tests.models import numpy_oracle
from tests.models.numpy_oracle import Array

MPT_BIAS_MAX = 16


@dataclass(frozen=True)
class Variant:
    """What may be added to plain causal attention, for each of `num_heads` heads."""

    num_heads: int = 6
    scales: tuple[float, ...] | float = 0.37
    window: tuple[int | None, ...] | int | None = None
    sink_tokens: int = 0
    softcap: float | None = None
    alibi: str | None = None
    sinks: tuple[float, ...] | None = None
    causal: bool = True

    def scoring(self) -> Scoring:
        return Scoring(
            scale=self.scales
            if isinstance(self.scales, float)
            else torch.tensor(self.scales, dtype=torch.float64),
            causal=self.causal,
            window=self.window,
            sink_tokens=self.sink_tokens,
            softcap=self.softcap,
            alibi=self._alibi(),
            sinks=None if self.sinks is None else torch.tensor(self.sinks, dtype=torch.float64),
        )

    def _alibi(self) -> Alibi | None:
        match self.alibi:
            case "bloom":
                return Alibi(alibi_slopes(self.num_heads))
            case "mpt":
                return Alibi(mpt_alibi_slopes(self.num_heads, MPT_BIAS_MAX))
            case "falcon":
                return Alibi(alibi_slopes(self.num_heads), before_scale=True, bfloat16=True)
        return None

    def expected(self, query: Array, key: Array, value: Array) -> numpy_oracle.Read:
        """By the oracle, for one sequence whose last query stands at its last key."""
        num_heads, shift = self.num_heads, len(key) - len(query)
        scales = (self.scales,) * num_heads if isinstance(self.scales, float) else self.scales
        windows = self.window if isinstance(self.window, tuple) else (self.window,) * num_heads

        def sees(head: int, row: int, at: int) -> bool:
            if self.causal and at > row + shift:
                return False
            return numpy_oracle.in_window(row + shift, at, windows[head], self.sink_tokens)

        def bias(head: int, at: int) -> float:
            slope = numpy_oracle.alibi_slopes(num_heads)[head]
            if self.alibi == "falcon":
                rounded = numpy_oracle.bfloat16
                return rounded(rounded(slope) * rounded(at)) * scales[head]
            if self.alibi == "mpt":
                slope **= MPT_BIAS_MAX / 8
            return slope * at if self.alibi else 0.0

        return numpy_oracle.attention(
            query,
            key,
            value,
            sees,
            scales=scales,
            softcap=self.softcap,
            bias=bias,
            sinks=self.sinks,
        )


@st.composite
def variants(draw: st.DrawFn, num_heads: int) -> Variant:
    """Several at once, in any mix."""

    def each(numbers: st.SearchStrategy[float]) -> tuple[float, ...]:
        return tuple(draw(st.lists(numbers, min_size=num_heads, max_size=num_heads)))

    sizes = st.none() | st.integers(1, 24)
    windows = st.lists(sizes, min_size=num_heads, max_size=num_heads).map(tuple)
    window = draw(sizes | windows)
    # Slopes and biases are float32; these are exact there.
    exact = num_heads in (1, 2, 4, 8)
    alibi = draw(st.none() | st.sampled_from(["bloom", "mpt", "falcon"])) if exact else None
    scale = 0.25 if alibi == "falcon" else 0.37
    return Variant(
        num_heads=num_heads,
        scales=each(st.floats(0.05, 0.6)) if alibi != "falcon" and draw(st.booleans()) else scale,
        window=window,
        sink_tokens=draw(st.integers(0, 5)),
        softcap=draw(st.none() | st.floats(0.5, 5.0)),
        alibi=alibi,
        sinks=each(st.floats(-4.0, 4.0)) if draw(st.booleans()) else None,
    )


PLAIN = Variant()
EACH_HEAD = Variant(
    scales=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    window=(1, 3, None, 6, 2, 50),
    sink_tokens=2,
    softcap=1.5,
    sinks=(-1.0, 0.0, 1.0, 2.0, 3.0, 0.5),
)


class Inputs(NamedTuple):
    """Heads before tokens, as the model has them."""

    query: Tensor
    key: Tensor
    value: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(part.to(dtype) for part in self))

    def last(self, count: int) -> "Inputs":
        """Only the last queries."""
        return Inputs(self.query[:, :, -count:], self.key, self.value)

    def row(self, index: int) -> tuple[Array, Array, Array]:
        """One of the batch as the oracle has it, tokens before heads."""
        query, key, value = (part[index].transpose(0, 1).double().numpy() for part in self)
        return query, key, value


def random_inputs(
    *, batch: int, num_heads: int, num_kv_heads: int, length: int, dim: int, seed: int = 0
) -> Inputs:
    """In float64."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return Inputs(query, key, value)
