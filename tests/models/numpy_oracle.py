"""Attention written a second time, as loops over float64 numbers."""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Array:
    """Causal attention of `[queries, heads, dim]` over `[keys, kv_heads, dim]`.

    The last query stands at the last key.
    """
    q, k, v = (part.double().numpy() for part in (query, key, value))
    num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    output = np.zeros_like(q)
    for row in range(num_queries):
        num_visible = num_keys - num_queries + row + 1
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            scores = [
                scale * sum(q[row, head, i] * k[at, kv_head, i] for i in range(head_dim))
                for at in range(num_visible)
            ]
            highest = max(scores)
            powers = [math.exp(score - highest) for score in scores]
            for at, power in enumerate(powers):
                output[row, head] += power / sum(powers) * v[at, kv_head]
    return output
