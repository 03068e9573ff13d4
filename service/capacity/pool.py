"""Who fits on the pages of a KV cache."""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from models.config import ModelConfig
from service.capacity.query import CapacityQuery
from service.capacity.residency import RequestShape, Residency, mean_kv_bytes, residency
from service.engine.block_manager import BlockManager
from service.engine.group_pool import BlockGroup, pages_for
from service.engine.memory import block_groups, page_bytes


@dataclass(frozen=True, slots=True)
class Pool:
    """Equal pages, and the requests that are to share them.

    Attributes:
        max_new_tokens: tokens of one step, over all sequences.
    """

    model: ModelConfig
    num_pages: int
    block_size: int
    max_new_tokens: int
    groups: tuple[BlockGroup, ...]
    mix: tuple[tuple[RequestShape, Residency], ...]

    @staticmethod
    def of(query: CapacityQuery, num_pages: int) -> "Pool":
        engine = query.engine
        groups = block_groups(query.model, engine.block_size)
        return Pool(
            model=query.model,
            num_pages=num_pages,
            block_size=engine.block_size,
            max_new_tokens=engine.max_num_batched_tokens,
            groups=groups,
            mix=tuple(
                (
                    shape,
                    residency(
                        shape.prompt,
                        shape.output,
                        groups,
                        engine.block_size,
                        engine.max_num_batched_tokens,
                    ),
                )
                for shape in query.mix
            ),
        )

    @property
    def weights(self) -> list[int]:
        """How many requests of each shape there are at one time, relative to each other: a
        request counts by its share and by how many steps it stays."""
        return [shape.share * shape.num_decodes for shape, _ in self.mix]

    @property
    def tokens(self) -> int | None:
        """Tokens that the blocks hold; None where windows let a block serve many."""
        is_plain = self.groups == (BlockGroup(),)
        return self.num_pages * self.block_size if is_plain else None

    def longest_request(self, at_most: int) -> int:
        """Prompt and output tokens of the longest request that the scheduler takes."""
        useful = pages_for(self.groups, self.block_size, at_most, self.max_new_tokens)
        manager = BlockManager(
            min(useful, self.num_pages),
            self.block_size,
            enable_prefix_caching=False,
            groups=self.groups,
        )
        # The last token is never written to the cache.
        return min(at_most, manager.max_tokens(at_most, self.max_new_tokens) + 1)

    def concurrent(self) -> int:
        """The most requests that always run together: they fit when each is at its largest, and
        each is admitted while all others claim the most that they ever do."""
        if not all(self._serves(shape) for shape, _ in self.mix):
            return 0
        most = self.num_pages * max(group.blocks_per_page for group in self.groups)
        return bisect.bisect_left(range(1, most + 1), True, key=lambda n: not self._holds(n))

    def concurrent_mean(self) -> int:
        """Requests of average size that fit."""
        claimed = self._mean([own.mean_claimed for _, own in self.mix])
        pages = sum(n / g.blocks_per_page for n, g in zip(claimed, self.groups, strict=True))
        return int(self.num_pages / pages)

    def mean_kv_bytes(self) -> float:
        """Keys and values that one running sequence reads in a decode step."""
        return self._mean([(mean_kv_bytes(shape, self.model),) for shape, _ in self.mix])[0]

    def waste(self) -> float:
        """Share of the blocks in use that no sequence reads."""
        page = page_bytes(self.model, self.block_size)
        held = self._mean([own.mean_held for _, own in self.mix])
        in_use = sum(
            n * page / group.blocks_per_page for n, group in zip(held, self.groups, strict=True)
        )
        return 1 - self.mean_kv_bytes() / in_use

    def _mean(self, values: Sequence[Sequence[float]]) -> list[float]:
        """Columns of values, on average over the requests at one time."""
        total = sum(self.weights)
        return [
            sum(w * value for w, value in zip(self.weights, column, strict=True)) / total
            for column in zip(*values, strict=True)
        ]

    def _serves(self, shape: RequestShape) -> bool:
        """Whether the scheduler takes such a request at all."""
        pages = pages_for(self.groups, self.block_size, shape.cached_tokens, self.max_new_tokens)
        return pages <= self.num_pages

    def _holds(self, num_requests: int) -> bool:
        # Of each shape its part, rounded up.
        counts = [-(-num_requests * weight // sum(self.weights)) for weight in self.weights]
        every = [own for _, own in self.mix]
        if not self._fit(_times(own.held, n) for own, n in zip(every, counts, strict=True)):
            return False
        for newest in range(len(every)):
            others = (
                _times(own.claimed, n - (index == newest))
                for index, (own, n) in enumerate(zip(every, counts, strict=True))
            )
            if not self._fit([*others, every[newest].start]):
                return False
        return True

    def _fit(self, blocks: Iterable[Sequence[int]]) -> bool:
        """Whether the sum of so many blocks of each group fits on the pages."""
        totals = map(sum, zip(*blocks, strict=True))
        pages = (-(-n // g.blocks_per_page) for n, g in zip(totals, self.groups, strict=True))
        return sum(pages) <= self.num_pages


def _times(blocks: Sequence[int], number: int) -> list[int]:
    return [number * n for n in blocks]
