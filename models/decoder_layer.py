"""One layer: attention and feed-forward block, and how they are added to what goes through."""

from typing import Protocol

from torch import Tensor, nn

from models.attention import Attention
from models.config import HeadConfig, ModelConfig, Residual
from models.kernels import KernelName
from models.layers import MLP, LayerNorm, MixtureOfExperts, RMSNorm, make_norm
from models.linear import BeforeLinear


class Block(Protocol):
    """Attention or feed-forward block: `residual + block(before(hidden))`."""

    def __call__(
        self,
        hidden: Tensor,
        before: BeforeLinear | None = None,
        residual: Tensor | None = None,
        /,
    ) -> Tensor: ...


class DecoderLayer(nn.Module):
    """Attention and feed-forward block with their norms and residual connections."""

    def __init__(self, config: ModelConfig, heads: HeadConfig, kernel: KernelName) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, heads, kernel)
        self.mlp_norm = None if config.shared_norm else make_norm(config)
        self.mlp = MixtureOfExperts(config) if config.num_experts else MLP(config)
        sandwich = config.residual == "sandwich_norm"
        self.attention_output_norm = make_norm(config) if sandwich else None
        self.mlp_output_norm = make_norm(config) if sandwich else None
        self.residual: Residual = config.residual
        self.residual_scale = config.residual_scale
        self.parallel = config.parallel

    def forward(self, hidden: Tensor, attend: Block) -> Tensor:
        """`[tokens, hidden]` to the same; `attend` runs this layer's attention."""
        if self.parallel:
            normed = self.attention_norm(hidden)
            mlp_input = normed if self.mlp_norm is None else self.mlp_norm(hidden)
            return hidden + self._scaled(attend(normed) + self.mlp(mlp_input))
        hidden = self._add(hidden, attend, self.attention_norm, self.attention_output_norm)
        return self._add(hidden, self.mlp, self.mlp_norm, self.mlp_output_norm)

    def _add(
        self,
        hidden: Tensor,
        block: Block,
        norm: RMSNorm | LayerNorm | None,
        output_norm: nn.Module | None,
    ) -> Tensor:
        assert norm is not None, "only parallel layers share a norm"
        match self.residual:
            case "pre_norm" if self.residual_scale == 1.0:
                return block(hidden, norm, hidden)
            case "pre_norm":
                return hidden + self._scaled(block(hidden, norm))
            case "post_norm":
                return norm(block(hidden, None, hidden))  # type: ignore[no-any-return]
            case "output_norm":
                return hidden + norm(block(hidden))  # type: ignore[no-any-return]
            case "sandwich_norm":
                assert output_norm is not None, "a sandwich has two norms"
                return hidden + output_norm(block(hidden, norm))  # type: ignore[no-any-return]

    def _scaled(self, added: Tensor) -> Tensor:
        return added if self.residual_scale == 1.0 else added * self.residual_scale
