"""The weights of a layer, cut into the heads that they belong to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import Attention
from models.errors import ConfigError
from models.linear import Linear


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """Of one layer, in float64; a bias is one more column, of an input that is always 1.

    Attributes:
        query: `[kv_heads, group, head_dim, inputs]`, the query heads that read a key/value head.
        key, value: `[kv_heads, head_dim, inputs]`.
        output: `[kv_heads, group, hidden, head_dim]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor

    @classmethod
    def of(cls, attention: Attention) -> "HeadWeights":
        """
        Raises:
            ConfigError: projections have a rank, and the matrix that all heads share cannot be cut.
        """
        if not isinstance(attention.qkv, Linear):
            rank = attention.qkv.reduce.out_features
            raise ConfigError("projection_rank", rank, "none: heads are changed before")
        heads = attention.heads
        rows = attention.qkv.dense_weight.detach().double()
        if attention.qkv.bias is not None:
            rows = torch.cat((rows, attention.qkv.bias.detach().double()[:, None]), dim=1)
        widths = (attention.query_width, attention.kv_width, attention.kv_width)
        query, key, value = rows.split(widths)
        output = attention.output.dense_weight.detach().double()
        num_kv_heads, group = heads.num_kv_heads, heads.num_heads // heads.num_kv_heads
        return cls(
            query.view(num_kv_heads, group, heads.head_dim, -1),
            key.view(num_kv_heads, heads.head_dim, -1),
            value.view(num_kv_heads, heads.head_dim, -1),
            output.view(-1, num_kv_heads, group, heads.head_dim).permute(1, 2, 0, 3),
        )

    def parameters(self, attention: Attention) -> dict[str, Tensor]:
        """The parameters of an attention module with these heads, in the type of `attention`."""
        rows = torch.cat([part.flatten(0, -2) for part in (self.query, self.key, self.value)])
        parameters = {"output.weight": self.output.permute(2, 0, 1, 3).flatten(1)}
        if attention.qkv.bias is not None:
            parameters["qkv.bias"] = rows[:, -1]
            rows = rows[:, :-1]
        parameters["qkv.weight"] = rows
        dtype = attention.qkv.dtype
        return {name: tensor.to(dtype).contiguous() for name, tensor in parameters.items()}
