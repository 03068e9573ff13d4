"""Rotary position embedding (Su et al. 2021), in all the forms that checkpoints use."""

import functools
import math

import torch
from torch import Tensor

from models.cpu import fused
from models.positions import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)


def rotation(config: RopeConfig, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines that rotate tokens at their positions.

    Args:
        positions: int64 `[tokens]`.
        lengths: int64 `[tokens]`, the length of the sequence in the eyes of each token; only
            scalings that depend on it look at it.

    Returns:
        Two float32 `[tokens, 1, rotary_dim // 2]`. Computed in float32, as the reference
        implementations do.
    """
    angles = positions[:, None, None].float() * frequencies(config, lengths).unsqueeze(-2)
    cos, sin, factor = angles.cos(), angles.sin(), _attention_factor(config)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def frequencies(config: RopeConfig, lengths: Tensor) -> Tensor:
    """Radians per position, float32 `[rotary_dim // 2]`, or `[tokens, rotary_dim // 2]` where they
    depend on the length."""
    dim, device = config.rotary_dim, lengths.device
    match config.scaling:
        case DynamicNtkScaling(factor, original_length):
            stretch = lengths.clamp_min(original_length).float() * factor / original_length
            base = config.theta * (stretch - (factor - 1)) ** (dim / (dim - 2))
            return 1.0 / base[:, None] ** _exponents(dim, device)
        case LongRopeScaling() as scaling:
            powers = config.theta ** _exponents(dim, device)
            short, long = (
                1.0 / (torch.tensor(factors, device=device) * powers)
                for factors in (scaling.short_factor, scaling.long_factor)
            )
            return torch.where(lengths[:, None] > scaling.original_length, long, short)
    # What is kept must not be made while a CUDA graph is recorded, whose memory is used again.
    return _kept_frequencies(config) if device.type == "cpu" else _frequencies(config, device)


@functools.cache
@torch.inference_mode(mode=False)
def _kept_frequencies(config: RopeConfig) -> Tensor:
    return _frequencies(config, torch.device("cpu"))


def _frequencies(config: RopeConfig, device: torch.device) -> Tensor:
    """Those that depend on no length."""
    plain = 1.0 / config.theta ** _exponents(config.rotary_dim, device)
    match config.scaling:
        case LinearScaling(factor):
            return plain / factor
        case Llama3Scaling() as scaling:
            return _llama3(plain, scaling)
        case YarnScaling() as scaling:
            return _yarn(plain, scaling, config)
    return plain


def _exponents(dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first dimensions of each head in pairs; the others stay.

    Args:
        x: `[tokens, heads, head_dim]`.
        cos, sin: `[tokens, 1, rotary_dim // 2]`, in the dtype of `x`.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
    """
    if fused.can_fuse(x, cos, sin):
        return fused.rope(x, cos, sin, interleaved=interleaved)
    rotary_dim = 2 * cos.shape[-1]
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((joined, rest), dim=-1) if rest.shape[-1] else joined


def _attention_factor(config: RopeConfig) -> float:
    scaling = config.scaling
    if isinstance(scaling, YarnScaling | LongRopeScaling):
        return scaling.attention_factor
    return 1.0


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelengths = 2 * math.pi / plain
    turns = scaling.original_length / wavelengths
    smooth = (turns - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * plain / scaling.factor + smooth * plain
    stretched = torch.where(turns < scaling.low_freq_factor, plain / scaling.factor, blended)
    return torch.where(turns > scaling.high_freq_factor, plain, stretched)


def _yarn(plain: Tensor, scaling: YarnScaling, config: RopeConfig) -> Tensor:
    dim = config.rotary_dim

    def dimension_of(turns: float) -> float:
        """Where a pair makes so many turns within the original length."""
        wavelength = scaling.original_length / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as the reference implementation avoids the division by zero
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=plain.device)
    interpolated = ((pairs - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * interpolated + plain * (1 - interpolated)
