"""The decoder: embed, L pre-norm layers, norm, project to the vocabulary."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from models.attention import Attention
from models.config import HeadConfig, ModelConfig
from models.kernels import KernelName, resolve_kernel
from models.kv_cache import AttentionMetadata, KVCache
from models.layers import MLP, make_norm
from models.rope import rope_table


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, heads: HeadConfig, kernel: KernelName) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, heads, kernel)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)


class Transformer(nn.Module):
    """A decoder-only transformer over packed tokens.

    Args:
        config: the model's shape.
        kernel: which implementation reads the paged cache.
    """

    def __init__(self, config: ModelConfig, *, kernel: KernelName = "auto") -> None:
        super().__init__()
        self.config = config
        self.kernel_name = resolve_kernel(kernel)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size)
            if config.rope_theta is None
            else None
        )
        self.layers = nn.ModuleList(DecoderLayer(config, heads, kernel) for heads in config.layers)
        self.final_norm = make_norm(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self._rope_tables: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Hidden states `[tokens, hidden]` after the final norm; writes the cache.

        Args:
            input_ids, positions: int64 `[tokens]`, packed as `metadata` describes.
        """
        hidden, rotations = self._embed(input_ids, positions)
        for layer, cache in zip(self._decoder_layers, kv_cache.layers, strict=True):
            normed = layer.attention_norm(hidden)
            hidden = hidden + layer.attention(
                normed, rotations.get(layer.attention.heads.head_dim), cache, metadata
            )
            hidden = hidden + layer.mlp(layer.mlp_norm(hidden))
        return self.final_norm(hidden)  # type: ignore[no-any-return]

    def forward_dense(self, input_ids: Tensor) -> Tensor:
        """Hidden states `[batch, tokens, hidden]` of `[batch, tokens]`, without a cache."""
        batch, num_tokens = input_ids.shape
        positions = torch.arange(num_tokens, device=input_ids.device).repeat(batch)
        hidden, rotations = self._embed(input_ids.flatten(), positions)
        for layer in self._decoder_layers:
            normed = layer.attention_norm(hidden)
            hidden = hidden + layer.attention.forward_dense(
                normed, rotations.get(layer.attention.heads.head_dim), batch
            )
            hidden = hidden + layer.mlp(layer.mlp_norm(hidden))
        return self.final_norm(hidden).unflatten(0, (batch, num_tokens))  # type: ignore[no-any-return]

    @property
    def _decoder_layers(self) -> Iterable[DecoderLayer]:
        return cast(Iterable[DecoderLayer], self.layers)

    def project_to_vocab(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocab]` in float32 of hidden states `[..., hidden]`."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return linear(hidden, head.weight).float()

    @torch.inference_mode()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits `[batch, tokens, vocab]`, float32, of int64 `[batch, tokens]`; uses no cache."""
        return self.project_to_vocab(self.forward_dense(input_ids))

    def _embed(
        self, input_ids: Tensor, positions: Tensor
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Embeddings `[tokens, hidden]`, and the rotation of each head width in use."""
        hidden = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            return hidden + self.embed_positions(positions), {}
        return hidden, {
            head_dim: self.rotation(head_dim, positions)
            for head_dim in {heads.head_dim for heads in self.config.layers}
        }

    def rotation(self, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[tokens, 1, head_dim // 2]` of `[tokens]` positions."""
        assert self.config.rope_theta is not None, "this model has learned positions"
        key = (head_dim, self.device, self.dtype)
        if key not in self._rope_tables:
            table = rope_table(
                head_dim, self.config.max_position_embeddings, self.config.rope_theta
            )
            self._rope_tables[key] = table.to(self.device, self.dtype)
        cos, sin = self._rope_tables[key][:, positions, None]
        return cos, sin


def random_model(
    config: ModelConfig,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    kernel: KernelName = "auto",
) -> Transformer:
    """A model with random weights, for benchmarks, tests and the start of training.

    Projections start at N(0, 1/√fan_in), those that write to the residual stream smaller by
    √(2·layers) (Radford et al. 2019), embeddings at N(0, 1/√hidden).
    """
    model = Transformer(config, kernel=kernel)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                std = parameter.shape[-1] ** -0.5
                if name.endswith(("output.weight", "down.weight")):
                    std /= (2 * config.num_layers) ** 0.5
                parameter.normal_(0.0, std, generator=generator)
    return model.to(device=device, dtype=dtype).eval()
