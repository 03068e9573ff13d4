"""What a training may do to heads: leave some out, pull them apart, give each a temperature."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

from models.attention import Attention
from models.config import HeadConfig
from models.errors import ConfigError
from models.linear import LowRankLinear
from models.transformer import HeadEdit, Transformer


def head_dropout(probability: float, seed: int) -> HeadEdit:
    """Leaves each head out of each row with a probability; the rest of a row is scaled by
    `heads / heads that are left` (Zhou et al. 2020). A row keeps one head at least.

    What is left out depends on seed and layer alone, so that a layer that is run again leaves out
    the same.
    """

    def edit(layer: int, attended: Tensor) -> Tensor:
        batch, num_heads = attended.shape[:2]
        generator = torch.Generator().manual_seed(seed * 1009 + layer)
        draws = torch.rand(batch, num_heads, generator=generator)
        kept = (draws >= probability) | (draws == draws.amax(dim=1, keepdim=True))
        factors = kept * (num_heads / kept.sum(dim=1, keepdim=True))
        return attended * factors.to(attended)[:, :, None, None]

    return edit


class HeadSimilarity:
    """Collects how alike what the heads of each layer read is; an edit that changes nothing."""

    def __init__(self) -> None:
        self._means: list[Tensor] = []

    def __call__(self, layer: int, attended: Tensor) -> Tensor:
        self._means.append(mean_cosine(attended))
        return attended

    @property
    def mean(self) -> Tensor:
        """Over the layers."""
        return torch.stack(self._means).mean()


def mean_cosine(attended: Tensor) -> Tensor:
    """Mean of the cosines of all H² pairs of heads, over rows and tokens of
    `[batch, heads, tokens, head_dim]`: minus the D_output of Li et al. 2018."""
    sums = normalize(attended.float(), dim=-1).sum(dim=1)
    return sums.square().sum(dim=-1).mean() / attended.shape[1] ** 2


class _Temperature(nn.Module):
    """The rows of each query head in a matrix of queries, keys and values, times a number."""

    def __init__(self, heads: HeadConfig) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.zeros(heads.num_heads))
        self.heads = heads

    def forward(self, weight: Tensor) -> Tensor:
        factors = self.logarithm.exp().repeat_interleave(self.heads.head_dim)
        rest = factors.new_ones(len(weight) - len(factors))
        return weight * torch.cat((factors, rest))[:, None]


@contextmanager
def head_temperatures(model: Transformer) -> Iterator[None]:
    """Each query head has a learned factor on its scores, as long as this lasts; then the factors
    become part of the query weights, which changes nothing.

    Raises:
        ConfigError: the queries have a bias, are normalised behind the weights, or have a rank.
    """
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    for attention in attentions:
        has_rank = isinstance(attention.qkv, LowRankLinear)
        if attention.qkv.bias is not None or attention.heads.qk_norm is not None or has_rank:
            allowed = "false for queries with a bias, a norm or a rank"
            raise ConfigError("head_temperature", True, allowed)
    for attention in attentions:
        temperature = _Temperature(attention.heads).to(attention.qkv.weight)
        parametrize.register_parametrization(attention.qkv, "weight", temperature)
    try:
        yield
    finally:
        for attention in attentions:
            parametrize.remove_parametrizations(attention.qkv, "weight")
