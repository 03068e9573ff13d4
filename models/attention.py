"""One attention module for every head configuration: `HeadConfig` decides."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from models.attention_metadata import AttentionMetadata
from models.config import HeadConfig, ModelConfig, QKNorm
from models.cpu import fused
from models.kernels import KernelName, check_kernel, get_kernel, paged_triton, resolve_kernel
from models.kernels.dense import attend
from models.kv_cache import CachePart
from models.kv_layout import query_heads
from models.layers import rms_norm
from models.linear import BeforeLinear, make_projection
from models.rope import apply_rope
from models.scoring import Scoring


class HeadNorm(nn.Module):
    """The norm of queries or of keys `[tokens, heads, head_dim]`; see `QKNorm`."""

    def __init__(self, config: QKNorm, num_heads: int, head_dim: int) -> None:
        super().__init__()
        shapes = {
            "head": (head_dim,),
            "each_head": (num_heads, head_dim),
            "all_heads": (num_heads * head_dim,),
        }
        self.weight = nn.Parameter(torch.ones(shapes[config.scope]))
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        if config.scope == "all_heads":
            flat = x.flatten(-2)
            return rms_norm(flat, self.weight, config.eps, unit_offset=config.unit_offset).view_as(
                x
            )
        if config.norm == "rms_norm":
            return rms_norm(x, self.weight, config.eps, unit_offset=config.unit_offset)
        return layer_norm(x, x.shape[-1:], eps=config.eps) * self.weight


class Attention(nn.Module):
    """Project, normalise, rotate, remember, attend, project.

    Query, key and value projection are one matrix, in this order of rows: one product instead
    of three.
    """

    def __init__(self, config: ModelConfig, heads: HeadConfig, kernel: KernelName) -> None:
        super().__init__()
        self.heads = heads
        self.query_width = heads.num_heads * heads.head_dim
        self.kv_width = heads.num_kv_heads * heads.head_dim
        hidden, rank = config.hidden_size, config.projection_rank
        qkv_width = self.query_width + 2 * self.kv_width
        self.qkv = make_projection(hidden, qkv_width, bias=config.qkv_bias, rank=rank)
        self.output = make_projection(self.query_width, hidden, bias=config.output_bias, rank=rank)
        self.query_norm, self.key_norm = (
            None if heads.qk_norm is None else HeadNorm(heads.qk_norm, num_heads, heads.head_dim)
            for num_heads in (heads.num_heads, heads.num_kv_heads)
        )
        self.sinks = nn.Parameter(torch.zeros(heads.num_heads)) if heads.learned_sinks else None
        check_kernel(kernel)
        self._kernel: KernelName = kernel
        self._scoring: Scoring | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Attention":
        self._scoring = None  # it is where the weights are
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._scoring = None  # the sinks may be others
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def kernel_name(self) -> str:
        """Which implementation reads the paged cache, where and as the weights are now.

        Raises:
            ConfigError: the kernel that was asked for cannot.
        """
        return resolve_kernel(self._kernel, self.heads, self.qkv.dtype, self.qkv.device)

    @property
    def scoring(self) -> Scoring:
        if self._scoring is None:
            self._scoring = self._describe_scoring()
        return self._scoring

    def _describe_scoring(self) -> Scoring:
        heads = self.heads
        scale: float | Tensor = heads.softmax_scale
        if heads.temperature is not None:
            with torch.inference_mode(False):  # it is kept, perhaps for training
                scale = scale * torch.tensor(heads.temperature, device=self.qkv.device)
        return Scoring(
            scale=scale,
            causal=heads.causal,
            window=heads.window,
            sink_tokens=heads.sink_tokens,
            softcap=heads.softcap,
            alibi=heads.alibi,
            sinks=self.sinks,
        )

    def project(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        before: BeforeLinear | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[tokens, heads or kv_heads, head_dim]` of `[tokens, hidden]`.

        Args:
            rotation: cosines and sines of the tokens' positions (see `models.rope`).
            before: is done to the hidden states first.
        """
        query, key, value = self._project(hidden, before)
        return (*self._rotate(query, key, rotation), value)

    def _project(
        self, hidden: Tensor, before: BeforeLinear | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same without the rotation."""
        heads = self.heads
        projected = self.qkv(hidden, before)
        if heads.clip_qkv is not None:
            projected = projected.clamp(-heads.clip_qkv, heads.clip_qkv)
        each = heads.num_heads, heads.num_kv_heads, heads.num_kv_heads
        query, key, value = projected.view(-1, sum(each), heads.head_dim).split(each, dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def _rotate(
        self, query: Tensor, key: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if self.heads.rope is None or rotation is None:
            return query, key
        interleaved = self.heads.rope.interleaved
        query = apply_rope(query, *rotation, interleaved=interleaved)
        key = apply_rope(key, *rotation, interleaved=interleaved)
        return query, key

    def _rotate_and_write(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: CachePart,
        slots: Tensor,
    ) -> Tensor:
        """The rotated queries, perhaps where the others were; rotated keys and values go to the
        cache."""
        if self.kernel_name == "paged_triton" and not query.requires_grad:
            rotate_and_store = paged_triton.rotate_and_store
        elif fused.can_fuse(query, key, value, *(rotation or ())):
            rotate_and_store = fused.rotate_and_store
        else:
            query, key = self._rotate(query, key, rotation)
            cache.write(key, value, slots)
            return query
        rope = self.heads.rope
        rotate_and_store(
            query,
            key,
            value,
            None if rope is None else rotation,
            cache.pool,
            slots,
            cache.places,
            interleaved=rope is not None and rope.interleaved,
        )
        return query

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: tuple[CachePart, ...],
        metadata: AttentionMetadata,
        before: BeforeLinear | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`residual + attention(before(hidden))` with the paged cache; `hidden` is packed
        `[tokens, hidden]`."""
        query, key, value = self._project(hidden, before)
        scoring, paged_attention = self.scoring, get_kernel(self.kernel_name)
        if len(cache) == 1:  # the usual case: all heads remember the same
            group = metadata.groups[cache[0].part.group]
            slots = group.slot_mapping
            query = self._rotate_and_write(query, key, value, rotation, cache[0], slots)
            attended = paged_attention(query, cache[0], group, scoring)
            return self.output(attended.flatten(-2), None, residual)  # type: ignore[no-any-return]
        attended = torch.empty_like(query)
        for part in cache:
            group = metadata.groups[part.part.group]
            kv_heads, heads = list(part.part.kv_heads), query_heads(self.heads, part.part)
            rotated = self._rotate_and_write(
                query[:, heads],
                key[:, kv_heads],
                value[:, kv_heads],
                rotation,
                part,
                group.slot_mapping,
            )
            attended[:, heads] = paged_attention(rotated, part, group, scoring.of_heads(heads))
        return self.output(attended.flatten(-2), None, residual)  # type: ignore[no-any-return]

    def forward_dense(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        batch: int,
        before: BeforeLinear | None = None,
        residual: Tensor | None = None,
        edit: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The same without a cache; `hidden` is `[batch * tokens, hidden]`, of equal lengths.

        Args:
            edit: is done to what the heads read, `[batch, heads, tokens, head_dim]`, before the
                output projection.
        """
        query, key, value = (
            part.unflatten(0, (batch, -1)).transpose(1, 2)
            for part in self.project(hidden, rotation, before)
        )
        scoring, length = self.scoring, query.shape[2]
        if scoring.is_plain(length):
            attended = attend(query, key, value, scoring, is_causal=length > 1)
        else:
            positions = torch.arange(length, device=hidden.device)[None]
            attended = attend(
                query,
                key,
                value,
                scoring,
                visible=scoring.visible(positions, positions),
                bias=scoring.bias(positions),
            )
        if edit is not None:
            attended = edit(attended)
        attended = attended.transpose(1, 2).flatten(0, 1).flatten(-2)
        return self.output(attended, None, residual)  # type: ignore[no-any-return]
