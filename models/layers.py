"""The parameterised parts of a decoder layer that are not attention."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, rms_norm, silu

from models.config import Activation, ModelConfig


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms_norm":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


def activate(x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "silu":
            return silu(x)
        case "gelu":
            return gelu(x)
        case "gelu_tanh":
            return gelu(x, approximate="tanh")
        case "relu":
            return relu(x)


class MLP(nn.Module):
    """Feed-forward block: gated (SwiGLU, Shazeer 2020) or plain.

    Gate and up projection are one matrix, gate rows first: one product instead of two.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.intermediate_size * (2 if config.gated_mlp else 1)
        self.up = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation: Activation = config.activation
        self.gated = config.gated_mlp

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.up(x).chunk(2, dim=-1)
            hidden = activate(gate, self.activation) * up
        else:
            hidden = activate(self.up(x), self.activation)
        return self.down(hidden)  # type: ignore[no-any-return]
