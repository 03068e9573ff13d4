"""What a model reads of a step: a plan as tensors."""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from models.attention_metadata import AttentionMetadata, count_up
from models.kv_cache import KVCache
from models.transfer import send
from service.engine.plan import ScheduledSequence, StepPlan


class Batch:
    """The tokens of a step, packed, and where they live in the cache.

    Attributes:
        input_ids, positions: int64 `[tokens]`.
    """

    def __init__(self, plan: StepPlan, kv_cache: KVCache) -> None:
        input_ids, positions = array("q"), array("q")
        for (seq, num_tokens, _), start in zip(plan.scheduled, plan.starts, strict=True):
            input_ids.extend(seq.token_ids[start : start + num_tokens])
            positions.extend(range(start, start + num_tokens))
        device = kv_cache.pool.device
        self.input_ids = send(torch.frombuffer(input_ids, dtype=torch.int64), device)
        self.positions = send(torch.frombuffer(positions, dtype=torch.int64), device)
        self.metadata = describe(plan.scheduled, plan.starts, kv_cache)
        self._positions = positions

    def advance(self, input_ids: Tensor, changed: SequenceOf[int]) -> None:
        """Go on to the next step of the same decodes, on a CPU.

        Args:
            input_ids: the tokens that this step chose.
            changed: sequences whose block tables are not what they were.
        """
        self.input_ids = input_ids
        count_up(self._positions)
        self.metadata.advance(changed)


def describe(
    scheduled: Iterable[ScheduledSequence], starts: SequenceOf[int], kv_cache: KVCache
) -> AttentionMetadata:
    """Where the planned tokens of some sequences live in the cache."""
    items = list(scheduled)
    return AttentionMetadata.build(
        block_tables=[item.seq.block_tables for item in items],
        num_computed_tokens=starts,
        num_new_tokens=[item.num_tokens for item in items],
        block_size=kv_cache.block_size,
        device=kv_cache.pool.device,
        tokens_per_gather=kv_cache.tokens_per_gather,
    )
