"""Multi-head attention as a module of its own, in two implementations of one function.

`MultiheadAttention` takes the arguments, parameters and masks of torch.nn.MultiheadAttention, so
that either can load the other's weights and stand in the other's place.
"""

from functools import reduce
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, pad

from models import torch_masks
from models.attention_checks import check_same_dtype, check_sequences
from models.errors import ConfigError
from models.kernels import dense, reference
from models.scoring import Scoring
from models.split_attention import attend_by_head

Implementation: TypeAlias = Literal["fused", "split"]


class MultiheadAttention(nn.Module):
    """MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W_O (Vaswani et al. 2017), where
    head_i = softmax(Q W_Q^i (K W_K^i)ᵀ / sqrt(head_dim)) V W_V^i.

    Where torch's module behaves in two ways or yields NaN, this one behaves so:

    - A query that sees no key reads 0 (the output bias remains) and its weights are 0.
    - `is_causal` says that `attn_mask` is causal. That is checked, and the mask is what counts.
    - The results with and without `need_weights` are the same, also with `is_causal`.
    - What cannot be meant is refused (see `models.attention_checks`).

    Args:
        embed_dim: width of queries and of the output.
        num_heads: each of width `embed_dim / num_heads`.
        dropout: share of the weights that is dropped, in training mode only.
        bias: whether the projections add a bias.
        add_bias_kv: append a learned key and value, which every query sees.
        add_zero_attn: append a key and value of zeros, which every query sees. A score of 0 and
            a value of 0 are a sink with logit 0 (see `Scoring.sinks`), and that is how it is done.
        kdim, vdim: width of keys and of values; None is `embed_dim`.
        batch_first: batched tensors are `[batch, tokens, width]` instead of
            `[tokens, batch, width]`.
        implementation: `fused` projects all heads at once and attends to all of them at once;
            `split` goes through the definition above head by head. The results are the same.

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        implementation: Implementation = "fused",
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.add_zero_attn = add_zero_attn
        self.batch_first = batch_first
        self.implementation = implementation
        self._check_arguments()
        self.head_dim = embed_dim // num_heads
        # torch.nn.TransformerEncoderLayer looks for this name.
        self._qkv_same_embed_dim = self.kdim == self.vdim == embed_dim

        def parameter(*shape: int, exists: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if exists else None

        fused = self._qkv_same_embed_dim
        self.in_proj_weight = parameter(3 * embed_dim, embed_dim, exists=fused)
        self.q_proj_weight = parameter(embed_dim, embed_dim, exists=not fused)
        self.k_proj_weight = parameter(embed_dim, self.kdim, exists=not fused)
        self.v_proj_weight = parameter(embed_dim, self.vdim, exists=not fused)
        self.in_proj_bias = parameter(3 * embed_dim, exists=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.bias_k = parameter(1, 1, embed_dim, exists=add_bias_kv)
        self.bias_v = parameter(1, 1, embed_dim, exists=add_bias_kv)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torch's module does: the same seed gives the same weights."""
        for weight in (
            self.in_proj_weight,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
        ):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for row in (self.bias_k, self.bias_v):
            if row is not None:
                nn.init.xavier_normal_(row)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: `[queries, embed_dim]`, or batched as `batch_first` says.
            key, value: `[keys, kdim or vdim]`, or batched likewise.
            key_padding_mask: `[batch, keys]`, or `[keys]`.
            attn_mask: `[queries, keys]`, or `[batch * heads, queries, keys]`. In both masks, a
                bool True means *may not attend* (the opposite of `models.masks`), and floats are
                added to the scaled scores.
            average_attn_weights: return the mean of the heads' weights.
            is_causal: `attn_mask`, which must be given, is causal.

        Returns:
            The output, shaped as `query`, and the weights: None without `need_weights`, else
            `[batch, queries, keys]`, or `[batch, heads, queries, keys]` when not averaged,
            without the batch for unbatched input. `add_bias_kv` and `add_zero_attn` each append
            a column, in this order.

        Raises:
            ShapeError, MaskError, InputError: tensors that cannot be attended with.
            ConfigError: `is_causal` without a mask.
        """
        widths = (self.embed_dim, self.kdim, self.vdim)
        check_sequences(query, key, value, widths, batch_first=self.batch_first)
        check_same_dtype({"out_proj.weight": self.out_proj.weight, "query": query})
        batched, is_self = query.dim() == 3, query is key and key is value
        query, key, value = (self._with_batch_first(part) for part in (query, key, value))
        shape = (query.shape[0], self.num_heads, query.shape[1], key.shape[1])
        if attn_mask is not None:
            attn_mask = torch_masks.attention(attn_mask, shape, batch_first=self.batch_first)
        if key_padding_mask is not None:
            key_padding_mask = torch_masks.padding(key_padding_mask, shape, batched=batched)
        if is_causal:
            torch_masks.check_causal(attn_mask, shape)
        visible, bias = torch_masks.merge(attn_mask, key_padding_mask)
        query, key, value = self._project(query, key, value, is_self=is_self)
        if self.bias_k is not None and self.bias_v is not None:
            key, value = (
                torch.cat((part, self._heads(row).expand(shape[0], -1, -1, -1)), dim=2)
                for part, row in ((key, self.bias_k), (value, self.bias_v))
            )
            visible = None if visible is None else pad(visible, (0, 1), value=True)
            bias = None if bias is None else pad(bias, (0, 1))
        attended, weights = self._attend(
            query, key, value, visible, bias, need_weights=need_weights
        )
        output = self._output(attended)
        if not batched:
            output = output[0]
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if weights is None:
            return output, None
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return output, weights if batched else weights[0]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        bias: Tensor | None,
        *,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """What each head reads, `[batch, heads, queries, head_dim]`, and the weights."""
        sinks = query.new_zeros(self.num_heads) if self.add_zero_attn else None
        scoring = Scoring(self.head_dim**-0.5, causal=False, sinks=sinks)
        drops = self.training and self.dropout > 0
        if self.implementation == "fused" and not need_weights and not drops:
            return dense.attend(query, key, value, scoring, visible=visible, bias=bias), None
        attend = reference.attend if self.implementation == "fused" else attend_by_head
        output, weights, lse = attend(query, key, value, scoring, visible=visible, bias=bias)
        if self.add_zero_attn:  # the sink's own weight, 1 / (1 + exp(lse - 0))
            weights = torch.cat((weights, (-lse).sigmoid()[..., None]), dim=-1)
        if drops:
            weights = dropout(weights, self.dropout)
            output = weights[..., : key.shape[2]].to(value.dtype) @ value
        return output, weights.to(query.dtype) if need_weights else None

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, *, is_self: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the heads, `[batch, heads, tokens, head_dim]`."""
        bias = self.in_proj_bias
        if is_self and self.in_proj_weight is not None and self.implementation == "fused":
            parts = linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
            return tuple(self._heads(part) for part in parts)  # type: ignore[return-value]
        weights: tuple[Tensor, ...]
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            each = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = tuple(weight for weight in each if weight is not None)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(  # type: ignore[return-value]
            self._project_one(*part)
            for part in zip((query, key, value), weights, biases, strict=True)
        )

    def _project_one(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.implementation == "fused":
            return self._heads(linear(x, weight, bias))
        weights = weight.chunk(self.num_heads)
        biases = [None] * self.num_heads if bias is None else bias.chunk(self.num_heads)
        return torch.stack([linear(x, *head) for head in zip(weights, biases, strict=True)], dim=1)

    def _output(self, attended: Tensor) -> Tensor:
        """Concat(heads) W_O, which is the sum of head_i W_O^i."""
        if self.implementation == "fused":
            return self.out_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
        weights = self.out_proj.weight.chunk(self.num_heads, dim=1)
        parts = (linear(attended[:, head], weight) for head, weight in enumerate(weights))
        output: Tensor = reduce(torch.add, parts)
        return output if self.out_proj.bias is None else output + self.out_proj.bias

    def _heads(self, x: Tensor) -> Tensor:
        """`[batch, tokens, embed_dim]` as `[batch, heads, tokens, head_dim]`."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]

    def _with_batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _check_arguments(self) -> None:
        for field in ("embed_dim", "num_heads", "kdim", "vdim"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "1 or more")
        if self.embed_dim % self.num_heads:
            swapped = self.num_heads % self.embed_dim == 0
            raise ConfigError(
                "embed_dim",
                self.embed_dim,
                f"a multiple of num_heads={self.num_heads}",
                f"embed_dim={self.num_heads}, num_heads={self.embed_dim}"
                if swapped
                else f"num_heads={_nearest_divisor(self.embed_dim, self.num_heads)}",
            )
        if not 0 <= self.dropout < 1:
            percent = 1 < self.dropout < 100
            raise ConfigError(
                "dropout",
                self.dropout,
                "0 or more, less than 1",
                f"{self.dropout / 100:g}" if percent else None,
            )
        if not isinstance(self.batch_first, bool):
            raise ConfigError(
                "batch_first",
                self.batch_first,
                "True for [batch, tokens, width], False for [tokens, batch, width]",
            )
        if self.implementation not in get_args(Implementation):
            raise ConfigError(
                "implementation", self.implementation, " or ".join(get_args(Implementation))
            )


def _nearest_divisor(number: int, to: int) -> int:
    divisors = (d for d in range(1, number + 1) if number % d == 0)
    return min(divisors, key=lambda divisor: abs(divisor - to))
