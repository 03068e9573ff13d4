"""The same decodes, step after step: what of a step follows from the one before.

After a model's step the processor's caches hold nothing of Python's, and what takes time is how
many objects are looked at: here few, as long as nothing has to be decided.
"""

from collections.abc import Sequence as SequenceOf
from typing import TypeGuard

from service.engine.block_manager import BlockManager
from service.engine.endings import last_length, last_token_ids
from service.engine.plan import Result, StepPlan
from service.engine.sequence import Sequence, SequenceOutput
from service.engine.stats import Progress


class DecodeRun:
    """Sequences each of which computes a token, and gets one, in every step.

    Args:
        plan: the first step.
        running: its sequences in the order in which they get blocks.
        eos_token_ids, max_len: see `ending_of`.
        rope_switch_length: see `Scheduler`.
    """

    def __init__(
        self,
        plan: StepPlan,
        running: SequenceOf[Sequence],
        block_manager: BlockManager,
        *,
        eos_token_ids: frozenset[int],
        max_len: int,
        rope_switch_length: int | None,
    ) -> None:
        self._plan = plan
        self._block_manager = block_manager
        self._eos_token_ids = eos_token_ids
        self._max_len = max_len
        self._rope_switch_length = rope_switch_length
        self._seqs = [item.seq for item in plan.scheduled]
        ranks = {seq.seq_id: rank for rank, seq in enumerate(running)}
        self._ranks = [ranks[seq.seq_id] for seq in self._seqs]
        self._seq_ids: list[int] = []
        # Steps for which no sequence ends by its length, and tokens that may end one before.
        self._num_quiet = 0
        self._last_token_ids: frozenset[int] = frozenset()

    def go_on(self, expired: tuple[SequenceOutput, ...]) -> StepPlan | None:
        """The next step, once the one before is recorded; None if there are not enough blocks."""
        starts = tuple([start + 1 for start in self._plan.starts])
        assert self._seqs[0].num_computed_tokens == starts[0], "the step before is not recorded"
        changed = self._block_manager.turning(starts)
        for index in sorted(changed, key=self._ranks.__getitem__):
            if not self._block_manager.grow(self._seqs[index], starts[index] + 1):
                return None
        self._plan = StepPlan(self._plan.scheduled, starts, expired, changed=changed)
        return self._plan

    def record(
        self, plan: StepPlan, results: SequenceOf[Result], now: float
    ) -> tuple[list[SequenceOutput], Progress] | None:
        """Record a step that went on: what is new for each sequence, and in all.

        None, and nothing is recorded, where a sequence may end or more is known than its token.
        """
        if plan is not self._plan or plan.changed is None:
            return None
        if not self._seq_ids:
            self._look_ahead()
        self._num_quiet -= 1
        if (
            self._num_quiet < 0
            or not _are_token_ids(results)
            or not self._last_token_ids.isdisjoint(results)
        ):
            return None
        last_time = self._seqs[0].last_token_time
        assert last_time is not None, "each has got a token in the step before"
        for seq, token_id in zip(self._seqs, results, strict=True):
            seq.token_ids.append(token_id)
            seq.num_computed_tokens += 1
            seq.last_token_time = now
        for index in self._block_manager.filled(plan.starts):
            self._block_manager.remember(self._seqs[index], 1)
        outputs = [
            SequenceOutput(seq_id, (token_id,))
            for seq_id, token_id in zip(self._seq_ids, results, strict=True)
        ]
        return outputs, Progress(token_gaps=[now - last_time] * len(outputs))

    def _look_ahead(self) -> None:
        seqs = self._seqs
        self._seq_ids = [seq.seq_id for seq in seqs]
        self._last_token_ids = frozenset(
            token_id for seq in seqs for token_id in last_token_ids(seq, self._eos_token_ids)
        )
        if any(seq.match_stop for seq in seqs):
            return
        lengths = [last_length(seq, self._max_len) - seq.num_tokens for seq in seqs]
        if self._rope_switch_length is not None:
            lengths += [
                self._rope_switch_length + 1 - seq.num_tokens
                for seq in seqs
                if seq.num_tokens <= self._rope_switch_length
            ]
        self._num_quiet = min(lengths) - 1


def _are_token_ids(results: SequenceOf[Result]) -> TypeGuard[SequenceOf[int]]:
    return set(map(type, results)) == {int}
