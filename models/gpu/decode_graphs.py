"""Decode steps recorded once, as CUDA graphs, and replayed: one launch for all of a step's kernels.

A graph serves every batch up to a number of sequences whose lengths do not exceed a bound: numbers
of the step lie in memory that stays where it is, rows behind the last sequence compute nothing that
is read, and spans of keys behind the end of a sequence do nothing.
"""

import functools
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from models.attention_metadata import AttentionMetadata, BlockTables, GroupMetadata
from models.kernels.paged_triton import partial_bytes
from models.kv_cache import KVCache
from models.layers import MixtureOfExperts
from models.query_batch import RELEASED, SequenceRow
from models.sampler import most_likely
from models.transfer import send
from models.transformer import Transformer

# The shortest bound of lengths: shorter sequences are read by one launch of few spans anyway.
_LEAST_LENGTH = 512
# Rows of no sequence: they hold no tokens, and are written nowhere.
_NOBODY = -1

Replay: TypeAlias = Callable[[], None]
# Records what a function does on a device, to tensors that stay where they are.
Capture: TypeAlias = Callable[[Callable[[], None]], Replay]


class Decode(NamedTuple):
    """One sequence that computes one token.

    Attributes:
        token: its id; or, behind a step whose tokens are not known yet, its row among them.
        position: how many tokens the cache holds before.
        block_tables: for each group of heads, reaching beyond the position.
    """

    token: int
    position: int
    block_tables: Sequence[Sequence[int]]


class Decoded(NamedTuple):
    """What a decode step computed.

    Attributes:
        logits: float32 `[sequences, vocab]`, until the next step is launched; NaN in one place at
            least where the hidden state was not finite.
        tokens: int64 `[sequences]`, the most likely ones (see `models.sampler.most_likely`).
    """

    logits: Tensor
    tokens: Tensor


class CudaCapture:
    """Records CUDA graphs that share their memory, because only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Replay:
        # Once before, on a stream of its own: kernels are compiled, libraries get their memory.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        return graph.replay


class DecodeGraphs:
    """A recorded decode step for each size of batch and bound of lengths.

    Args:
        max_num_seqs: sequences of the largest batch.
        max_length: tokens of the longest sequence, the new one included.
        capture: how a step is recorded.
        progress: told how many of how many steps are recorded.
    """

    def __init__(
        self,
        model: Transformer,
        kv_cache: KVCache,
        *,
        max_num_seqs: int,
        max_length: int,
        capture: Capture,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._batches = buckets(1, max_num_seqs)
        self._lengths = buckets(_LEAST_LENGTH, max_length)
        device = model.device
        largest = self._batches[-1], self._lengths[-1]
        with torch.inference_mode():
            self._numbers = torch.zeros(
                sum(self._sizes(*largest)), dtype=torch.int32, device=device
            )
            self._logits = torch.empty(
                (largest[0], model.config.vocab_size), dtype=torch.float32, device=device
            )
            self._tokens = torch.empty(largest[0], dtype=torch.int64, device=device)
            self._recorded: dict[tuple[int, int], _Recorded] = {}
            # The largest first: the others find room in its memory.
            keys = [(b, n) for n in reversed(self._lengths) for b in reversed(self._batches)]
            for done, key in enumerate(keys):
                progress(done, len(keys))
                self._fill([], *key)
                views = self._views(*key)
                replay = capture(functools.partial(self._step, views))
                self._recorded[key] = _Recorded(replay, views)
            progress(len(keys), len(keys))

    def run(self, decodes: Sequence[Decode], before: Tensor | None = None) -> Decoded:
        """One step, launched.

        Args:
            before: int64 `[rows]`, the tokens of the step before, if they are not known yet.
        """
        batch = _bucket(self._batches, len(decodes))
        length = _bucket(self._lengths, max(decode.position for decode in decodes) + 1)
        self._fill(decodes, batch, length)
        if before is not None:
            ids = self._numbers[:batch]
            ids.copy_(before.index_select(0, ids).clamp_(min=0))
        self._recorded[batch, length].replay()
        return Decoded(self._logits[: len(decodes)], self._tokens[: len(decodes)].clone())

    def _sizes(self, batch: int, length: int) -> list[int]:
        """How many numbers a step has: ids, positions, and for each group slots and blocks."""
        groups = len(self._kv_cache.layout.groups)
        width = -(-length // self._kv_cache.block_size)
        return [batch, batch, *[batch] * groups, *[batch * width] * groups]

    def _fill(self, decodes: Sequence[Decode], batch: int, length: int) -> None:
        """The numbers of a step, in one copy."""
        size = self._kv_cache.block_size
        width, padding = -(-length // size), batch - len(decodes)
        numbers = array("i", (decode.token for decode in decodes))
        numbers.extend([0] * padding)
        numbers.extend(decode.position for decode in decodes)
        numbers.extend([_NOBODY] * padding)
        groups = range(len(self._kv_cache.layout.groups))
        for group in groups:
            for _, position, tables in decodes:
                numbers.append(tables[group][position // size] * size + position % size)
            numbers.extend([_NOBODY] * padding)
        for group in groups:
            for decode in decodes:
                table = decode.block_tables[group][:width]
                numbers.extend(table)
                numbers.extend([RELEASED] * (width - len(table)))
            numbers.extend([RELEASED] * (padding * width))
        sent = send(torch.frombuffer(numbers, dtype=torch.int32), self._numbers.device)
        self._numbers[: len(numbers)].copy_(sent)

    def _views(self, batch: int, length: int) -> "_Views":
        """Where the numbers of a step lie, and what does not change with them."""
        sizes = self._sizes(batch, length)
        ids, computed, *rest = self._numbers[: sum(sizes)].split(sizes)
        groups = len(rest) // 2
        metadata = AttentionMetadata(
            tuple(
                _StaticDecodes(slots, tables.view(batch, -1), computed, length, self._kv_cache)
                for slots, tables in zip(rest[:groups], rest[groups:], strict=True)
            )
        )
        return _Views(ids, computed, metadata)

    def _step(self, views: "_Views") -> None:
        """What is recorded."""
        ids, computed, metadata = views
        hidden = self._model(ids, computed.clamp(min=0), self._kv_cache, metadata)
        logits = self._model.project_to_vocab(hidden)
        # A cap on logits would hide what is not finite.
        logits[:, 0] += (hidden * 0).sum(dim=-1)
        self._logits[: len(ids)].copy_(logits)
        self._tokens[: len(ids)].copy_(most_likely(logits))


class _Views(NamedTuple):
    ids: Tensor
    computed: Tensor
    metadata: AttentionMetadata


class _Recorded(NamedTuple):
    """A step, and what it reads: a graph knows addresses only, and keeps nothing alive."""

    replay: Replay
    views: _Views


class _StaticDecodes(GroupMetadata):
    """One new token for each sequence of a batch, described by memory that stays where it is."""

    def __init__(
        self, slots: Tensor, tables: Tensor, computed: Tensor, length: int, kv_cache: KVCache
    ) -> None:
        batch, device = len(slots), slots.device
        super().__init__(
            [SequenceRow((), length - 1, 1)] * batch, kv_cache.block_size, device, None
        )
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self.slot_mapping = slots
        self.block_tables = BlockTables(tables, starts, computed)


def buckets(least: int, most: int) -> list[int]:
    """Powers of two times `least`, up to `most`, which is the last."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]


def _bucket(sizes: Iterable[int], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)


def why_uncapturable(model: Transformer, kv_cache: KVCache) -> str | None:
    """Why decode steps of a model cannot be recorded; None if they can."""
    if model.kernel_name != "paged_triton":
        return f"attention is computed by {model.kernel_name}"
    if model.config.rope_depends_on_length:
        return "rotations depend on the length of a text"
    if any(isinstance(module, MixtureOfExperts) for module in model.modules()):
        return "experts are picked by the host"
    if any(len(parts) > 1 for parts in kv_cache.layers):
        return "heads of one layer remember different stretches of the past"
    return None


def memory_bytes(model: Transformer, *, max_num_seqs: int, max_length: int) -> int:
    """Bytes that the recorded steps of a model take at most, about."""
    config, batch = model.config, max_num_seqs
    logits = batch * config.vocab_size * (2 * 4 + model.dtype.itemsize)
    widest = max(
        config.hidden_size,
        2 * config.intermediate_size,
        *((heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim for heads in config.layers),
    )
    rows = 8 * batch * widest * model.dtype.itemsize
    return logits + rows + max(partial_bytes(h, batch, max_length) for h in config.layers)
