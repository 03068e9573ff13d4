"""Limits of one engine. Numbers only; read from nowhere, checked once."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How much one engine takes on.

    Attributes:
        block_size: tokens per KV block.
        num_blocks: KV blocks, or pages that are cut into blocks where heads remember different
            stretches of the past; None derives them from `kv_cache_bytes`.
        kv_cache_bytes: memory for the KV cache; None takes what `max_num_seqs` full contexts
            need, at most a share of the free memory.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens per step over all sequences (prefill chunks and decodes).
        max_model_len: prompt and output tokens of one request; None is the model's own limit.
        max_waiting_requests, max_waiting_tokens: bounds of the queue; a request beyond either is
            refused, except by an empty queue.
        max_bypass: how many later requests may overtake a waiting one, by priority, by deadline
            or because they are small enough to fit.
        enable_prefix_caching: reuse KV blocks of equal prompt beginnings.
        batch_invariant: what a request gets has the same bits whatever runs beside it; refused
            where that cannot be.
        kernel: which implementation reads the KV cache.
        dtype: type of weights and computation; `auto` is what the checkpoint says.
        weight_dtype: how the weights of linear layers are kept; `int8` rounds them, and what they
            multiply, to 8 bits (see `Transformer.pack_weights`).
        kv_cache_dtype: `int8` keeps keys and values as 8 bits, with a scale for each head and
            token; `auto` keeps them in `dtype`.
        device: `cpu`, `cuda` or `cuda:N`; `auto` is a GPU if there is one.
        cuda_graphs: on a GPU, record decode steps when the engine starts and launch each as one,
            before the tokens of the step before are known to the host.
        num_threads: threads of one step on a CPU; None takes all cores.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    max_waiting_requests: int = 256
    max_waiting_tokens: int = 262_144
    max_bypass: int = 64
    enable_prefix_caching: bool = False
    batch_invariant: bool = False
    kernel: Literal["auto", "paged_cpu", "paged_triton", "dense", "reference"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    weight_dtype: Literal["auto", "int8"] = "auto"
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    device: str = "auto"
    cuda_graphs: bool = True
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for field in (
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_waiting_requests",
            "max_waiting_tokens",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; allowed: 1 or more")
        for field in ("num_blocks", "kv_cache_bytes", "max_model_len", "num_threads"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} is {value}; allowed: 1 or more")
        if self.max_bypass < 0:
            raise ValueError(f"max_bypass is {self.max_bypass}; allowed: 0 or more")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; allowed: at least "
                f"max_num_seqs={self.max_num_seqs}, so that every running sequence can decode"
            )
