"""What models compute, written a second time from the papers: loops over float64 numbers.

Nothing here shares a line or a shortcut with the code that it checks. Every function works on
one sequence (or one vector); batches are for the tests to loop over.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


# Attention


@dataclass(frozen=True)
class Read:
    """`output` [queries, heads, width], `weights` [heads, queries, keys], `lse` [heads, queries].

    The log-sum-exp leaves a learned sink out; of a query that sees nothing it is -inf.
    """

    output: Array
    weights: Array
    lse: Array


def attention(
    query: Array,
    key: Array,
    value: Array,
    sees: Callable[[int, int, int], bool],
    *,
    scales: Sequence[float],
    softcap: float | None = None,
    bias: Callable[[int, int], float] = lambda head, at: 0.0,
    sinks: Sequence[float] | None = None,
) -> Read:
    """Attention of `[queries, heads, dim]` over `[keys, kv_heads, dim]`.

    Args:
        sees: whether, in this head, this query (a row) looks at this key (a row).
        scales: of each head.
        bias: what is added, in this head, to the scaled score of this key.
        sinks: of each head, a logit that takes weight and gives nothing.
    """
    num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads, width = value.shape
    output = np.zeros((num_queries, num_heads, width))
    weights = np.zeros((num_heads, num_queries, num_keys))
    lse = np.full((num_heads, num_queries), -math.inf)
    for head in range(num_heads):
        kv_head = head * num_kv_heads // num_heads
        for row in range(num_queries):
            seen = [at for at in range(num_keys) if sees(head, row, at)]
            scores: list[float] = []
            for at in seen:
                score = scales[head] * float(np.dot(query[row, head], key[at, kv_head]))
                if softcap is not None:
                    score = softcap * math.tanh(score / softcap)
                scores.append(score + bias(head, at))
            if not seen:
                continue
            highest = max([*scores, *([] if sinks is None else [sinks[head]])])
            powers = [math.exp(score - highest) for score in scores]
            total = sum(powers)
            # Taken from the highest score alone: a high sink would leave no power above 0.
            top = max(scores)
            lse[head, row] = top + math.log(sum(math.exp(score - top) for score in scores))
            if sinks is not None:
                total += math.exp(sinks[head] - highest)
            for at, power in zip(seen, powers, strict=True):
                weights[head, row, at] = power / total
                output[row, head] += power / total * value[at, kv_head]
    return Read(output, weights, lse)


def in_window(query: int, key: int, window: int | None, sink_tokens: int) -> bool:
    """`window` counts the query's own position; on either side if both sides are seen at all."""
    return window is None or abs(query - key) + 1 <= window or key < sink_tokens


# Linear biases


def alibi_slopes(num_heads: int) -> list[float]:
    """Press et al.: 2^(-8/n), 2^(-16/n), ...; for other n those of the next lower power of two,
    then every other one of the double."""
    if num_heads & (num_heads - 1) == 0:
        return [2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads)]
    lower = 1
    while 2 * lower < num_heads:
        lower *= 2
    return alibi_slopes(lower) + alibi_slopes(2 * lower)[::2][: num_heads - lower]


def bfloat16(number: float) -> float:
    """The nearest number with a significand of eight bits; of two equally near, the even one."""
    (bits,) = struct.unpack("<I", struct.pack("<f", number))
    low = bits & 0xFFFF
    bits -= low
    if low > 0x8000 or (low == 0x8000 and bits & 0x10000):
        bits += 0x10000
    (rounded,) = struct.unpack("<f", struct.pack("<I", bits))
    return float(rounded)


# Rotary positions


def plain_frequencies(theta: float, dim: int) -> list[float]:
    return [theta ** (-2.0 * pair / dim) for pair in range(dim // 2)]


def dynamic_frequencies(
    theta: float, dim: int, factor: float, original: int, length: int
) -> list[float]:
    """The base that stretches the slowest pair as far as the sequence is longer."""
    longer = max(length, original) / original
    return plain_frequencies(theta * (factor * longer - factor + 1) ** (dim / (dim - 2)), dim)


def llama3_frequencies(
    theta: float, dim: int, factor: float, low: float, high: float, original: int
) -> list[float]:
    """Pairs with fewer than `low` turns in the original length are slowed down, pairs with more
    than `high` are kept, those between are mixed in proportion."""
    frequencies: list[float] = []
    for frequency in plain_frequencies(theta, dim):
        turns = original * frequency / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        frequencies.append(kept * frequency + (1 - kept) * frequency / factor)
    return frequencies


def yarn_frequencies(
    theta: float,
    dim: int,
    factor: float,
    original: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> list[float]:
    """As Llama's, but mixed along the index of the pair."""

    def pair_with(turns: float) -> float:
        # original * theta^(-2 pair / dim) / 2π = turns, solved for the pair.
        return dim / 2 * math.log(original / (2 * math.pi * turns), theta)

    first, last = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    frequencies: list[float] = []
    for pair, frequency in enumerate(plain_frequencies(theta, dim)):
        slowed = min(max((pair - first) / (last - first), 0.0), 1.0)
        frequencies.append(slowed * frequency / factor + (1 - slowed) * frequency)
    return frequencies


def longrope_frequencies(
    theta: float,
    dim: int,
    short: Sequence[float],
    long: Sequence[float],
    original: int,
    length: int,
) -> list[float]:
    divisors = long if length > original else short
    plain = plain_frequencies(theta, dim)
    return [frequency / divisor for frequency, divisor in zip(plain, divisors, strict=True)]


def rotate(vector: Array, angles: Sequence[float], *, interleaved: bool) -> Array:
    """Turn each pair of a head as a complex number; numbers without a pair stay."""
    turned = vector.copy()
    half = len(angles)
    for pair, angle in enumerate(angles):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        number = complex(vector[first], vector[second])
        number *= complex(math.cos(angle), math.sin(angle))
        turned[first], turned[second] = number.real, number.imag
    return turned


# Norms and feed-forward blocks


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Of one vector."""
    mean_square = sum(float(number) ** 2 for number in x) / len(x)
    return np.array([n / math.sqrt(mean_square + eps) for n in x]) * weight


def layer_norm(x: Array, weight: Array, eps: float) -> Array:
    """Of one vector, without a bias."""
    mean = sum(float(number) for number in x) / len(x)
    return rms_norm(x - mean, weight, eps)


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
}


def experts(
    x: Array,
    router: tuple[Array, Array],
    up: tuple[Array, Array],
    down: tuple[Array, Array],
    *,
    num_picked: int,
    limit: float,
) -> Array:
    """One token through a mixture of experts, weights and biases as gpt-oss stores them."""
    logits = [float(np.dot(row, x) + bias) for row, bias in zip(*router, strict=True)]
    picked = sorted(range(len(logits)), key=lambda expert: -logits[expert])[:num_picked]
    powers = {expert: math.exp(logits[expert] - logits[picked[0]]) for expert in picked}
    output = np.zeros_like(x)
    for expert in picked:
        wide = x @ up[0][expert] + up[1][expert]
        hidden: list[float] = []
        for gate, linear in zip(wide[0::2], wide[1::2], strict=True):
            gate, linear = min(gate, limit), min(max(linear, -limit), limit)
            hidden.append(gate / (1 + math.exp(-1.702 * gate)) * (linear + 1))
        share = powers[expert] / sum(powers.values())
        output += share * (np.array(hidden) @ down[0][expert] + down[1][expert])
    return output


def softcap(x: float, cap: float) -> float:
    return cap * math.tanh(x / cap)
