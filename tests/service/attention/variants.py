"""Every variant of attention: what a client says, and what that means, in plain numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service.client import Alibi, Rope
from tests.models import numpy_oracle
from tests.models.numpy_oracle import Array, Read

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM, VALUE_DIM = 2, 6, 2, 7, 9, 8, 5
OFFSET = KEYS - QUERIES

Sees = Callable[[int, int, int, int], bool]
Frequencies = Callable[[int], list[float]]


def tensors(num_queries: int = QUERIES, seed: int = 0) -> tuple[Array, Array, Array]:
    """Queries, keys and values, heads first."""
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((BATCH, HEADS, num_queries, DIM)) * 1.5,
        rng.standard_normal((BATCH, KV_HEADS, KEYS, DIM)),
        rng.standard_normal((BATCH, KV_HEADS, KEYS, VALUE_DIM)),
    )


def _causal(row: int, head: int, query: int, key: int) -> bool:
    return key <= query + OFFSET


def _all(row: int, head: int, query: int, key: int) -> bool:
    return True


def _near(window: int, sinks: int = 0) -> Sees:
    return lambda row, head, query, key: numpy_oracle.in_window(query + OFFSET, key, window, sinks)


def _both(*rules: Sees) -> Sees:
    return lambda *at: all(rule(*at) for rule in rules)


@dataclass(frozen=True)
class Case:
    """What is sent, and what the oracle is told.

    Attributes:
        bias: for row, head, query and key.
        turns: angles per position, given the length of a row; None rotates nothing.
        bar: largest difference in float64.
    """

    sent: Mapping[str, Any]
    sees: Sees = _causal
    scales: tuple[float, ...] = (DIM**-0.5,) * HEADS
    softcap: float | None = None
    bias: Callable[[int, int, int, int], float] = lambda row, head, query, key: 0.0
    sinks: tuple[float, ...] | None = None
    turns: Frequencies | None = None
    interleaved: bool = False
    positions: Array = field(default_factory=lambda: np.tile(np.arange(KEYS), (BATCH, 1)))
    bar: float = 1e-12


def expected(case: Case, query: Array, key: Array, value: Array) -> list[Read]:
    """One reading for each row of the batch."""
    return [_row(case, row, query[row], key[row], value[row]) for row in range(len(query))]


def _row(case: Case, row: int, query: Array, key: Array, value: Array) -> Read:
    query, key, value = (part.transpose(1, 0, 2).copy() for part in (query, key, value))
    if case.turns is not None:
        positions = case.positions[row]
        frequencies = case.turns(int(positions.max()) + 1)
        for part, start in ((query, KEYS - len(query)), (key, 0)):
            for index, token in enumerate(part):
                angles = [float(positions[start + index]) * f for f in frequencies]
                for head, vector in enumerate(token):
                    part[index, head] = numpy_oracle.rotate(
                        vector, angles, interleaved=case.interleaved
                    )
    reads = [
        # The oracle's bias knows no query; one query at a time.
        numpy_oracle.attention(
            query[at : at + 1],
            key,
            value,
            lambda head, _, k, at=at: case.sees(row, head, at, k),  # type: ignore[misc]
            scales=case.scales,
            softcap=case.softcap,
            bias=lambda head, k, at=at: case.bias(row, head, at, k),  # type: ignore[misc]
            sinks=case.sinks,
        )
        for at in range(len(query))
    ]
    return Read(
        np.concatenate([read.output for read in reads]).transpose(1, 0, 2),
        np.concatenate([read.weights for read in reads], axis=1),
        np.concatenate([read.lse for read in reads], axis=1),
    )


_WINDOWS = (1, 2, 3, None, 5, 40)
_TEMPERATURE = (0.5, 1.0, 1.5, 2.0, 0.1, 3.0)
_SINKS = (0.5, -1.0, 2.0, 0.0, 30.0, -30.0)
_SLOPES = (0.5, 0.25, 0.125, 0.0625, 1.0, 2.0)
_SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, -1, -1, -1]])
_VISIBLE = np.random.default_rng(1).random((BATCH, 1, QUERIES, KEYS)) > 0.4
_BIAS = np.random.default_rng(2).standard_normal((1, HEADS, QUERIES, KEYS))
_HIDING = np.where(np.random.default_rng(3).random((QUERIES, KEYS)) > 0.3, 0.25, -np.inf)
_HIDING[2] = -np.inf
_POSITIONS = np.array([np.arange(KEYS) + 3, np.arange(KEYS) * 2])
_THETA = 100.0


def _rope(bar: float = 2e-6, **fields: Any) -> dict[str, Any]:
    return {"sent": {"mask": "causal", "rope": Rope(theta=_THETA, **fields)}, "bar": bar}


def _plain(length: int) -> list[float]:
    return numpy_oracle.plain_frequencies(_THETA, DIM)


CASES: dict[str, Case] = {
    "causal": Case({"mask": "causal"}),
    "bidirectional": Case({"mask": "bidirectional"}, _all),
    "prefix": Case(
        {"mask": "prefix", "prefix_lengths": [5, 0]},
        lambda row, head, query, key: key <= query + OFFSET or key < (5, 0)[row],
    ),
    "prefix with a window": Case(
        {"mask": "prefix", "prefix_lengths": [6, 9], "window": 3},
        _both(lambda r, h, q, k: k <= q + OFFSET or k < (6, 9)[r], _near(3)),
    ),
    "packed": Case(
        {"mask": "causal", "segment_ids": _SEGMENTS},
        _both(_causal, lambda r, h, q, k: _SEGMENTS[r, q + OFFSET] == _SEGMENTS[r, k]),
    ),
    "packed alike": Case(
        {"mask": "bidirectional", "segment_ids": _SEGMENTS[0]},
        lambda r, h, q, k: _SEGMENTS[0, q + OFFSET] == _SEGMENTS[0, k],
    ),
    "padding": Case(
        {"mask": "bidirectional", "key_lengths": [4, 9]}, lambda r, h, q, k: k < (4, 9)[r]
    ),
    "nothing but padding": Case(
        {"mask": "bidirectional", "key_lengths": [0, 1]}, lambda r, h, q, k: k < (0, 1)[r]
    ),
    "visible": Case(
        {"mask": "bidirectional", "visible": _VISIBLE}, lambda r, h, q, k: _VISIBLE[r, 0, q, k]
    ),
    "visible and causal": Case(
        {"mask": "causal", "visible": _VISIBLE},
        _both(_causal, lambda r, h, q, k: _VISIBLE[r, 0, q, k]),
    ),
    "bias": Case({"mask": "causal", "bias": _BIAS}, bias=lambda r, h, q, k: _BIAS[0, h, q, k]),
    "bias that hides": Case(
        {"mask": "bidirectional", "bias": _HIDING},
        lambda r, h, q, k: _HIDING[q, k] == 0.25,
        bias=lambda r, h, q, k: _HIDING[q, k],
    ),
    "window": Case({"mask": "causal", "window": 3}, _both(_causal, _near(3))),
    "window on both sides": Case({"mask": "bidirectional", "window": 3}, _near(3)),
    "window with sink tokens": Case(
        {"mask": "causal", "window": 2, "sink_tokens": 2}, _both(_causal, _near(2, 2))
    ),
    "windows per head": Case(
        {"mask": "causal", "window": _WINDOWS},
        _both(_causal, lambda r, h, q, k: numpy_oracle.in_window(q + OFFSET, k, _WINDOWS[h], 0)),
    ),
    "scale": Case({"mask": "causal", "scale": 0.9}, scales=(0.9,) * HEADS),
    "temperature": Case(
        {"mask": "causal", "temperature": _TEMPERATURE, "scale": 0.7},
        scales=tuple(0.7 * t for t in _TEMPERATURE),
    ),
    "softcap": Case({"mask": "causal", "softcap": 0.8}, softcap=0.8),
    "learned sinks": Case({"mask": "causal", "sinks": _SINKS}, sinks=_SINKS),
    "alibi": Case({"mask": "causal", "alibi": _SLOPES}, bias=lambda r, h, q, k: _SLOPES[h] * k),
    "alibi before the scale": Case(
        {"mask": "causal", "alibi": Alibi(slopes=_SLOPES, before_scale=True)},
        bias=lambda r, h, q, k: _SLOPES[h] * k * DIM**-0.5,
        bar=2e-6,
    ),
    "alibi in bfloat16": Case(
        {
            "mask": "causal",
            "alibi": Alibi(slopes=[s * 1.01 for s in _SLOPES], bfloat16=True),
        },
        bias=lambda r, h, q, k: numpy_oracle.bfloat16(numpy_oracle.bfloat16(_SLOPES[h] * 1.01) * k),
    ),
    "positions": Case(
        {"mask": "causal", "key_positions": _POSITIONS, "alibi": _SLOPES, "window": 5},
        lambda r, h, q, k: k <= q + OFFSET and _POSITIONS[r, q + OFFSET] - _POSITIONS[r, k] < 5,
        bias=lambda r, h, q, k: _SLOPES[h] * _POSITIONS[r, k],
    ),
    "query positions": Case(
        {"mask": "causal", "query_positions": np.arange(QUERIES)}, lambda r, h, q, k: k <= q
    ),
    "rope": Case(**_rope(), turns=_plain),
    "rope at positions": Case(
        {"mask": "causal", "rope": Rope(theta=_THETA), "key_positions": _POSITIONS},
        turns=_plain,
        positions=_POSITIONS,
        bar=2e-6,
    ),
    "rope interleaved": Case(**_rope(interleaved=True), turns=_plain, interleaved=True),
    "rope on a part": Case(
        **_rope(rotary_dim=4), turns=lambda n: numpy_oracle.plain_frequencies(_THETA, 4)
    ),
    "rope linear": Case(
        **_rope(linear={"factor": 4.0}), turns=lambda n: [f / 4 for f in _plain(n)]
    ),
    "rope dynamic": Case(
        **_rope(dynamic_ntk={"factor": 2.0, "original_length": 5}),
        turns=lambda n: numpy_oracle.dynamic_frequencies(_THETA, DIM, 2.0, 5, n),
    ),
    "rope llama3": Case(
        **_rope(
            llama3={
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_length": 64,
            }
        ),
        turns=lambda n: numpy_oracle.llama3_frequencies(_THETA, DIM, 8.0, 1.0, 4.0, 64),
    ),
    "rope yarn": Case(
        **_rope(
            yarn={
                "factor": 4.0,
                "original_length": 16,
                "attention_factor": 1.5,
                "beta_fast": 3.0,
                "truncate": False,
            }
        ),
        turns=lambda n: numpy_oracle.yarn_frequencies(_THETA, DIM, 4.0, 16, 3.0, 1.0, False),
        scales=(1.5**2 * DIM**-0.5,) * HEADS,
    ),
    "rope long": Case(
        **_rope(
            longrope={
                "short_factor": [1.0, 1.0, 1.0, 1.0],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
                "original_length": 8,
                "attention_factor": 1.2,
            }
        ),
        turns=lambda n: numpy_oracle.longrope_frequencies(
            _THETA, DIM, [1.0] * 4, [1.0, 2.0, 3.0, 4.0], 8, n
        ),
        scales=(1.2**2 * DIM**-0.5,) * HEADS,
    ),
    "all at once": Case(
        {
            "mask": "causal",
            "window": _WINDOWS,
            "sink_tokens": 1,
            "softcap": 2.0,
            "sinks": _SINKS,
            "alibi": _SLOPES,
            "temperature": _TEMPERATURE,
            "bias": _BIAS,
            "visible": _VISIBLE,
            "key_lengths": [8, 9],
        },
        lambda r, h, q, k: (
            k <= q + OFFSET
            and numpy_oracle.in_window(q + OFFSET, k, _WINDOWS[h], 1)
            and bool(_VISIBLE[r, 0, q, k])
            and k < (8, 9)[r]
        ),
        scales=tuple(t * DIM**-0.5 for t in _TEMPERATURE),
        softcap=2.0,
        bias=lambda r, h, q, k: _SLOPES[h] * k + _BIAS[0, h, q, k],
        sinks=_SINKS,
    ),
}
