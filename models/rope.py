"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama checkpoints."""

import torch
from torch import Tensor


def rope_table(head_dim: int, max_positions: int, theta: float) -> Tensor:
    """Cosines and sines of every position.

    Returns:
        float32 `[2, max_positions, head_dim // 2]`: cosines, then sines. Computed in float32 as
        the reference implementations do, so that a lookup equals their on-the-fly values.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (theta**exponents)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2).

    Args:
        x: `[tokens, heads, head_dim]`.
        cos, sin: `[tokens, 1, head_dim // 2]`, in the dtype of `x`.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
