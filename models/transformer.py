"""The model: embed, run the layers, project to the vocabulary."""

import functools
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from models.attention import Attention
from models.attention_metadata import AttentionMetadata
from models.config import ModelConfig
from models.cpu.decoder_stack import DecoderStack
from models.cpu.fused import can_fuse
from models.cpu.linear import PackedWeight, WeightDType, pack, why_unpackable
from models.decoder_layer import DecoderLayer
from models.errors import ConfigError
from models.gpu import fused as gpu_fused
from models.kernels import KernelName
from models.kv_cache import KVCache
from models.layers import MixtureOfExperts, make_norm
from models.linear import Linear
from models.memory import LargeMemory
from models.positions import RopeConfig
from models.rope import rotation
from models.sampler import most_likely

Rotations = dict[RopeConfig | None, tuple[Tensor, Tensor]]
# Layer index and what its heads read, `[batch, heads, tokens, head_dim]`, to what they hand on.
HeadEdit = Callable[[int, Tensor], Tensor]


class Transformer(nn.Module):
    """A transformer over packed tokens: a decoder, or an encoder if its heads are not causal.

    Args:
        config: the model's shape.
        kernel: which implementation reads the paged cache.
    """

    def __init__(self, config: ModelConfig, *, kernel: KernelName = "auto") -> None:
        super().__init__()
        self.config = config
        embedding_size = config.embedding_size or config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, embedding_size)
        projected = embedding_size != config.hidden_size
        self.embed_projection = (
            Linear(embedding_size, config.hidden_size, bias=False) if projected else None
        )
        self.embed_positions = (
            nn.Embedding(config.learned_positions, config.hidden_size)
            if config.learned_positions
            else None
        )
        self.embed_token_types = (
            nn.Embedding(config.num_token_types, config.hidden_size)
            if config.num_token_types
            else None
        )
        self.embed_norm = make_norm(config) if config.embedding_norm else None
        self.layers = nn.ModuleList(DecoderLayer(config, heads, kernel) for heads in config.layers)
        self.final_norm = make_norm(config) if config.final_norm else None
        self.output_projection = (
            Linear(config.hidden_size, embedding_size, bias=False) if projected else None
        )
        self.lm_head = (
            None
            if config.tie_word_embeddings or not config.is_causal
            else Linear(embedding_size, config.vocab_size, bias=config.lm_head_bias)
        )
        self._ropes = {heads.rope for heads in config.layers if heads.rope is not None}
        # The embeddings once more, where they are the output head too and weights are packed.
        self._packed_head: PackedWeight | None = None

    def pack_weights(
        self, weight_dtype: WeightDType = "auto", *, batch_invariant: bool = False
    ) -> None:
        """Keep the weights of linear layers in the order in which the processor reads them, where
        that is faster. Embeddings that are the output head too take their memory twice then.

        For inference: until `unpack_weights`, changes of the embeddings do not reach the head.

        Args:
            weight_dtype: `int8` keeps weights of linear layers as 8 bits, with a scale for each
                output, and rounds what they multiply to 8 bits for each token. Embeddings and
                experts stay as they are.
            batch_invariant: what the model says of a sequence has to have the same bits whatever
                else is in a step, even if that is slower.

        Raises:
            ConfigError: weights of 8 bits cannot be used here, or results would depend on what
                else is in a step.
        """
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        embeddings = self.embed_tokens.weight
        is_tied = self.lm_head is None and self.config.is_causal
        is_int8 = any(module.weight.dtype == torch.int8 for module in linears)
        if is_int8 and weight_dtype != "int8":
            raise ConfigError("weight_dtype", weight_dtype, "int8: the weights are rounded already")
        if weight_dtype == "int8" and not is_int8:
            self.unpack_weights()
            weights = [module.weight for module in linears]
            for weight in [*weights, embeddings] if is_tied else weights:
                if (reason := why_unpackable(weight, "int8")) is not None:
                    raise ConfigError("weight_dtype", "int8", f"auto, because {reason}")
        memory = LargeMemory()
        for module in linears:
            module.pack(weight_dtype, although_slower=batch_invariant, memory=memory)
        why_not_head = why_unpackable(embeddings, weight_dtype, although_slower=batch_invariant)
        if is_tied and self._packed_head is None and why_not_head is None:
            self._packed_head = pack(embeddings.detach(), weight_dtype, memory)
        if batch_invariant and (reason := self._why_variant()) is not None:
            raise ConfigError("batch_invariant", True, f"false, because {reason}")

    def _why_variant(self) -> str | None:
        """What makes results depend on the other rows of a step, by the way a library blocks a
        sum; None if nothing does."""
        for name, module in self.named_modules():
            if isinstance(module, MixtureOfExperts):
                return f"{name} multiplies by torch's own operations"
            if isinstance(module, Linear) and not module.is_packed:
                reason = why_unpackable(module.weight, although_slower=True)
                return f"{name} multiplies by torch's own operations ({reason})"
        if self.lm_head is None and self.config.is_causal and self._packed_head is None:
            return "the output head multiplies by torch's own operations"
        if self.kernel_name != "paged_cpu":
            return f"attention is computed by {self.kernel_name}"
        return None

    def unpack_weights(self) -> None:
        """The opposite of `pack_weights`."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.unpack()
        self._packed_head = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        self._packed_head = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def kernel_name(self) -> str:
        """Which kernels attend: of all layers alike, or each of them once, joined by `+`.

        Raises:
            ConfigError: the kernel that was asked for cannot compute a layer's heads here.
        """
        names = dict.fromkeys(layer.attention.kernel_name for layer in self._decoder_layers)
        return "+".join(names)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def num_parameters(self) -> int:
        padding = sum(
            module.weight.numel() - module.in_features * module.out_features
            for module in self.modules()
            if isinstance(module, Linear)
        )
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    @property
    def step_bytes(self) -> int:
        """Weight bytes that every step reads: all but embeddings that are looked up only."""
        head = self.embed_tokens.weight if self._packed_head is None else self._packed_head.data
        lookups = [self.embed_tokens, self.embed_positions, self.embed_token_types]
        looked_up = {id(table.weight) for table in lookups if table is not None}
        read: list[Tensor] = [p for p in self.parameters() if id(p) not in looked_up]
        if self.lm_head is None and self.config.is_causal:
            read.append(head)
        return sum(weight.nbytes for weight in read)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Hidden states `[tokens, hidden]` after the last layer and norm; writes the cache.

        Args:
            input_ids, positions: int64 `[tokens]`, packed as `metadata` describes.
            lengths: int64 `[tokens]`, the length of the sequence in the eyes of each token;
                needed only if `config.rope_depends_on_length`.
        """
        hidden = self._embed(input_ids, positions)
        rotations = self._rotations(positions, lengths)
        if can_fuse(hidden) and (stack := DecoderStack.of(self.layers, kv_cache)) is not None:
            return self._finish(stack.run(hidden, rotations, metadata))
        for layer, cache in zip(self._decoder_layers, kv_cache.layers, strict=True):
            attention = layer.attention
            hidden = layer(
                hidden,
                lambda x, before=None, residual=None, /, attention=attention, cache=cache: (
                    attention(
                        x, rotations.get(attention.heads.rope), cache, metadata, before, residual
                    )
                ),
            )
        return self._finish(hidden)

    def forward_dense(
        self, input_ids: Tensor, *, edit: HeadEdit | None = None, recompute: bool = False
    ) -> Tensor:
        """Hidden states `[batch, tokens, hidden]` of `[batch, tokens]`, without a cache.

        Args:
            edit: changes what the heads of a layer read, before its output projection.
            recompute: keep only the inputs of layers for the backward pass and run each layer
                once more there (Chen et al. 2016): less memory, a third more work.
        """
        batch, num_tokens = input_ids.shape
        positions = torch.arange(num_tokens, device=input_ids.device).repeat(batch)
        hidden = self._embed(input_ids.flatten(), positions)
        rotations = self._rotations(positions, torch.full_like(positions, num_tokens))
        for index, layer in enumerate(self._decoder_layers):
            attention = layer.attention
            edit_layer = None if edit is None else functools.partial(edit, index)
            run = functools.partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            hidden = run(
                hidden,
                lambda x, before=None, residual=None, /, attention=attention, edit=edit_layer: (
                    attention.forward_dense(
                        x, rotations.get(attention.heads.rope), batch, before, residual, edit
                    )
                ),
            )
        return self._finish(hidden).unflatten(0, (batch, num_tokens))  # type: ignore[no-any-return]

    def project_to_vocab(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocab]` in float32 of hidden states `[..., hidden]`.

        Raises:
            ValueError: the model is an encoder, which predicts no tokens.
        """
        logits = self._unscaled_logits(hidden).float()
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * (logits / self.config.logit_softcap).tanh()
        return logits

    def most_likely(self, hidden: Tensor) -> Tensor:
        """The most likely token of each row of hidden states `[rows, hidden]`, int64 `[rows]`:
        `models.sampler.most_likely` of the logits, which need not be converted for that.

        Raises:
            ValueError: as `project_to_vocab`.
        """
        if self.config.logit_scale != 1.0 or self.config.logit_softcap is not None:
            return most_likely(self.project_to_vocab(hidden))
        return most_likely(self._unscaled_logits(hidden))

    def _unscaled_logits(self, hidden: Tensor) -> Tensor:
        """In the model's type."""
        if not self.config.is_causal:
            raise ValueError("an encoder has no logits; `forward_dense` gives its hidden states")
        if self.output_projection is not None:
            hidden = self.output_projection(hidden)
        if self.lm_head is not None:
            return self.lm_head(hidden)  # type: ignore[no-any-return]
        if self._packed_head is not None:
            return self._packed_head.multiply(hidden)
        if gpu_fused.can_multiply(hidden, self.embed_tokens.weight):
            return gpu_fused.multiply(self.embed_tokens.weight, hidden)
        return linear(hidden, self.embed_tokens.weight)

    @torch.inference_mode()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits `[batch, tokens, vocab]`, float32, of int64 `[batch, tokens]`; uses no cache."""
        return self.project_to_vocab(self.forward_dense(input_ids))

    @property
    def attentions(self) -> list[Attention]:
        """The attention modules, layer by layer."""
        return [layer.attention for layer in self._decoder_layers]

    @property
    def _decoder_layers(self) -> Iterable[DecoderLayer]:
        return cast(Iterable[DecoderLayer], self.layers)

    def _embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Embeddings `[tokens, hidden]`."""
        hidden: Tensor = self.embed_tokens(input_ids)
        if self.config.embedding_scale != 1.0:
            # Rounded to the model's type first, as the reference implementations do.
            hidden = hidden * torch.tensor(self.config.embedding_scale, dtype=hidden.dtype).item()
        if self.embed_projection is not None:
            hidden = self.embed_projection(hidden)
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(positions + self.config.position_offset)
        if self.embed_token_types is not None:
            hidden = hidden + self.embed_token_types.weight[0]
        return hidden if self.embed_norm is None else self.embed_norm(hidden)

    def _finish(self, hidden: Tensor) -> Tensor:
        return hidden if self.final_norm is None else self.final_norm(hidden)

    def _rotations(self, positions: Tensor, lengths: Tensor | None) -> Rotations:
        """Cosines and sines of the tokens for each rotary setting in use."""
        return {config: self.rotation(config, positions, lengths) for config in self._ropes}

    def rotation(
        self, config: RopeConfig, positions: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[tokens, 1, rotary_dim // 2]` of `[tokens]` positions, in the
        model's type; `lengths` as in `forward`."""
        assert not config.depends_on_length or lengths is not None, "lengths are needed"
        cos, sin = rotation(config, positions, positions if lengths is None else lengths)
        return cos.to(self.dtype), sin.to(self.dtype)


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
                parameter.fill_(0.0 if config.norm_unit_offset else 1.0)
            else:
                std = parameter.shape[-1] ** -0.5
                if name.endswith(("output.weight", "down.weight")):
                    std /= (2 * config.num_layers) ** 0.5
                parameter.normal_(0.0, std, generator=generator)
    return model.to(device=device, dtype=dtype).eval()
