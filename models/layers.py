"""The parameterised parts of a layer that are not attention."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, relu, silu
from torch.nn.functional import rms_norm as torch_rms_norm

from models.before import Before
from models.config import Activation, ModelConfig
from models.cpu import fused
from models.gpu import fused as gpu_fused
from models.linear import BeforeLinear, make_projection


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019).

    Args:
        unit_offset: multiply by `1 + weight` (Gemma).
    """

    def __init__(self, size: int, eps: float, *, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if unit_offset else torch.ones(size))
        self.eps = eps
        self.unit_offset = unit_offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)

    def fused(self, dtype: torch.dtype) -> Before | None:
        if self.unit_offset or self.weight.dtype != dtype:
            return None
        return Before(norm=self.weight, eps=self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's, which no linear layer does by itself."""

    def fused(self, dtype: torch.dtype) -> None:
        return None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """`x / rms(x) * weight` over the last axis; weights of several axes go with the last ones."""
    if unit_offset:
        wide = torch.promote_types(x.dtype, torch.float32)
        scaled = torch_rms_norm(x.to(wide), x.shape[-1:], eps=eps) * (1 + weight.to(wide))
        return scaled.to(x.dtype)
    if weight.dim() == 1 and fused.can_fuse(x, weight):
        return fused.rms_norm(x, weight, eps)
    if weight.dim() == 1 and gpu_fused.can_fuse(x, weight):
        return gpu_fused.rms_norm(x, weight, eps)
    if weight.dim() == 1:
        return torch_rms_norm(x, x.shape[-1:], weight, eps)
    return torch_rms_norm(x, x.shape[-1:], eps=eps) * weight


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    if config.norm == "rms_norm":
        return RMSNorm(config.hidden_size, config.norm_eps, unit_offset=config.norm_unit_offset)
    return LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


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


class Gate:
    """`activation(gate) * value` of `[..., gate and value]` (Shazeer 2020)."""

    def __init__(self, activation: Activation) -> None:
        self._activation: Activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        if self._activation == "silu" and fused.can_fuse(x):
            return fused.silu_mul(x)
        if self._activation == "silu" and gpu_fused.can_fuse(x):
            return gpu_fused.silu_mul(x)
        gate, value = x.chunk(2, dim=-1)
        return activate(gate, self._activation) * value

    def fused(self, dtype: torch.dtype) -> Before | None:
        return Before(swiglu=True) if self._activation == "silu" else None


class MLP(nn.Module):
    """Feed-forward block: gated (SwiGLU, Shazeer 2020) or plain.

    Gate and up projection are one matrix, gate rows first: one product instead of two.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size
        bias, rank = config.mlp_bias, config.projection_rank
        up_width = 2 * wide if config.gated_mlp else wide
        self.up = make_projection(hidden, up_width, bias=bias, rank=rank)
        self.down = make_projection(wide, hidden, bias=bias, rank=rank)
        self.activation: Activation = config.activation
        self.gate = Gate(config.activation) if config.gated_mlp else None

    def forward(
        self, x: Tensor, before: BeforeLinear | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`residual + mlp(before(x))`."""
        hidden = self.up(x, before)
        if self.gate is None:
            hidden = activate(hidden, self.activation)
        return self.down(hidden, self.gate, residual)  # type: ignore[no-any-return]


class MixtureOfExperts(nn.Module):
    """Some of many gated blocks for each token, as gpt-oss does it.

    A router picks the experts; the softmax runs over the picked ones only. Gate and up columns
    alternate, both are clamped, and the up part has 1 added.
    """

    _GATE_SLOPE = 1.702

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, wide = config.num_experts, config.hidden_size, config.intermediate_size
        self.router = nn.Linear(hidden, experts)
        self.up_weight = nn.Parameter(torch.zeros(experts, hidden, 2 * wide))
        self.up_bias = nn.Parameter(torch.zeros(experts, 2 * wide))
        self.down_weight = nn.Parameter(torch.zeros(experts, wide, hidden))
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.num_picked = config.num_experts_per_token
        assert config.swiglu_limit is not None, "a mixture of experts has a limit"
        self.limit = config.swiglu_limit

    def forward(
        self, x: Tensor, before: BeforeLinear | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`residual + experts(before(x))`."""
        if before is not None:
            x = before(x)
        output = self._mix(x)
        return output if residual is None else residual + output

    def _mix(self, x: Tensor) -> Tensor:
        logits, picked = self.router(x).topk(self.num_picked, dim=-1)
        shares = logits.softmax(dim=-1)
        output = torch.zeros_like(x)
        for expert in picked.unique().tolist():
            rows, places = (picked == expert).nonzero(as_tuple=True)
            both = linear(x[rows], self.up_weight[expert].T, self.up_bias[expert])
            gate = both[:, ::2].clamp(max=self.limit)
            up = both[:, 1::2].clamp(-self.limit, self.limit)
            hidden = (up + 1) * gate * torch.sigmoid(self._GATE_SLOPE * gate)
            down = linear(hidden, self.down_weight[expert].T, self.down_bias[expert])
            output.index_add_(0, rows, down * shares[rows, places, None])
        return output
