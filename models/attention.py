"""One attention module for multi-head, grouped-query and multi-query: `num_kv_heads` decides."""

from torch import Tensor, nn

from models.config import HeadConfig, ModelConfig
from models.kernels import KernelName, get_kernel
from models.kernels.dense import causal_attention
from models.kv_cache import AttentionMetadata, LayerCache
from models.rope import apply_rope


class Attention(nn.Module):
    """Project, rotate, remember, attend, project.

    Query, key and value projection are one matrix, in this order of rows: one product instead
    of three.
    """

    def __init__(self, config: ModelConfig, heads: HeadConfig, kernel: KernelName) -> None:
        super().__init__()
        self.heads = heads
        self.query_width = heads.num_heads * heads.head_dim
        self.kv_width = heads.num_kv_heads * heads.head_dim
        self.qkv = nn.Linear(
            config.hidden_size, self.query_width + 2 * self.kv_width, bias=config.qkv_bias
        )
        self.output = nn.Linear(self.query_width, config.hidden_size, bias=config.output_bias)
        self._paged_attention = get_kernel(kernel)

    def project(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[tokens, heads or kv_heads, head_dim]` of `[tokens, hidden]`.

        Args:
            rotation: cosines and sines of the tokens' positions (see `models.rope`).
        """
        query, key, value = self.qkv(hidden).split(
            (self.query_width, self.kv_width, self.kv_width), dim=-1
        )
        query = query.unflatten(-1, (self.heads.num_heads, self.heads.head_dim))
        key = key.unflatten(-1, (self.heads.num_kv_heads, self.heads.head_dim))
        value = value.unflatten(-1, (self.heads.num_kv_heads, self.heads.head_dim))
        if rotation is not None:
            query, key = apply_rope(query, *rotation), apply_rope(key, *rotation)
        return query, key, value

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Attend with the paged cache; `hidden` is packed `[tokens, hidden]`."""
        query, key, value = self.project(hidden, rotation)
        cache.write(key, value, metadata.slot_mapping)
        attended = self._paged_attention(query, cache, metadata, self.heads.softmax_scale)
        return self.output(attended.flatten(-2))  # type: ignore[no-any-return]

    def forward_dense(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None, batch: int
    ) -> Tensor:
        """Attend without a cache; `hidden` is `[batch * tokens, hidden]`, rows of equal length."""
        query, key, value = (
            part.unflatten(0, (batch, -1)).transpose(1, 2)
            for part in self.project(hidden, rotation)
        )
        attended = causal_attention(query, key, value, self.heads.softmax_scale)
        return self.output(attended.transpose(1, 2).flatten(0, 1).flatten(-2))  # type: ignore[no-any-return]
