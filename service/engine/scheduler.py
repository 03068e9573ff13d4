"""Who runs in the next step, and how many tokens each. Integers only, no tensors.

There is one rule for prefill, chunked prefill, decode and recomputation: a sequence has tokens
whose keys and values are not computed yet, and a step computes some of them. A decode is a
sequence with one such token.
"""

import bisect
import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from service.engine.block_manager import BlockManager
from service.engine.config import EngineConfig
from service.engine.decode_run import DecodeRun
from service.engine.endings import ending_of, length_ending
from service.engine.errors import NeverFitsError, QueueFullError
from service.engine.plan import Result, ScheduledSequence, StepPlan, StepResult
from service.engine.sampling_params import SamplingParams
from service.engine.sequence import (
    Finish,
    FinishReason,
    Sequence,
    SequenceOutput,
    SequenceStatus,
)
from service.engine.stats import Progress
from service.engine.waiting_queue import WaitingQueue


class Scheduler:
    """Admission, token budget, preemption and endings.

    Args:
        config: limits.
        block_manager: the KV blocks.
        max_model_len: prompt and output tokens of one request.
        eos_token_ids: tokens with which the model ends.
        rope_switch_length: a sequence that grows beyond it is computed again from its beginning,
            because all its keys would be rotated differently; None is never.
        whole_prompts: a prompt is computed in one step or not at all, because each of its tokens
            sees all others.
        on_finish: told the end of every request, however it ends.
        clock: monotonic seconds.

    Attributes:
        progress: what the last step brought.
    """

    def __init__(
        self,
        config: EngineConfig,
        block_manager: BlockManager,
        *,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        rope_switch_length: int | None = None,
        whole_prompts: bool = False,
        on_finish: Callable[[Finish], None] = lambda finish: None,
        clock: Callable[[], float],
    ) -> None:
        self.block_manager = block_manager
        self.running: list[Sequence] = []
        self.waiting = WaitingQueue(config.max_bypass)
        self.progress = Progress()
        self._config = config
        self._eos_token_ids = eos_token_ids
        self._rope_switch_length = rope_switch_length
        self._whole_prompts = whole_prompts
        self._on_finish = on_finish
        self._clock = clock
        self._by_id: dict[int, Sequence] = {}
        # No request has an earlier one; that which had it may have ended.
        self._earliest_deadline = math.inf
        # Begun by the last plan, or one before, if all that run now decode.
        self._decode_run: DecodeRun | None = None
        # Whether something may be admitted that the last plan did not admit.
        self._has_changed = False
        # The last token of a request needs no slot.
        self._capacity = block_manager.max_tokens(max_model_len, config.max_num_batched_tokens)
        self._max_len = min(max_model_len, self._capacity + 1)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._by_id)

    @property
    def num_waiting_tokens(self) -> int:
        return sum(seq.num_tokens for seq in self.waiting)

    def has_room_for(self, num_tokens: int) -> bool:
        """Whether the queue takes one more request of so many tokens; an empty one always does."""
        return not self.waiting or (
            len(self.waiting) < self._config.max_waiting_requests
            and self.num_waiting_tokens + num_tokens <= self._config.max_waiting_tokens
        )

    def check_fits(self, num_prompt_tokens: int, params: SamplingParams | None) -> None:
        """Refuse what could not be served even by an idle engine.

        Raises:
            NeverFitsError: it needs more blocks than there are.
        """
        needed = params.max_kv_tokens(num_prompt_tokens) if params else num_prompt_tokens
        if needed > self._capacity:
            raise NeverFitsError(num_tokens=needed, max_tokens=self._capacity)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence.

        Raises:
            NeverFitsError: see `check_fits`.
            QueueFullError: the queue has reached a limit.
        """
        self.check_fits(seq.num_tokens, seq.params)
        if len(self.waiting) >= self._config.max_waiting_requests:
            raise QueueFullError(unit="requests", limit=self._config.max_waiting_requests)
        if not self.has_room_for(seq.num_tokens):
            raise QueueFullError(unit="tokens", limit=self._config.max_waiting_tokens)
        self._by_id[seq.seq_id] = seq
        if seq.deadline is not None:
            self._earliest_deadline = min(self._earliest_deadline, seq.deadline)
        self._has_changed = True
        self.waiting.push(seq)

    def abort(self, seq_id: int, reason: FinishReason) -> SequenceOutput | None:
        """End a sequence at whatever stage it is; None if it has ended already."""
        seq = self._by_id.get(seq_id)
        return None if seq is None else self._end(seq, reason)

    def abort_all(self, reason: FinishReason) -> list[SequenceOutput]:
        return [self._end(seq, reason) for seq in list(self._by_id.values())]

    def schedule(self) -> StepPlan:
        """Plan one step, after what was planned before was recorded; takes blocks for it."""
        expired = tuple(self._expire())
        if self._decode_run is not None and self._admits_nobody:
            plan = self._decode_run.go_on(expired)
            if plan is not None:
                self._has_changed = False
                return plan
        plan = self._plan(expired)
        self._decode_run = None
        is_of_all = plan.is_decode and 0 < len(plan.scheduled) == len(self.running)
        if is_of_all and self._admits_nobody:
            self._decode_run = DecodeRun(
                plan,
                self.running,
                self.block_manager,
                eos_token_ids=self._eos_token_ids,
                max_len=self._max_len,
                rope_switch_length=self._rope_switch_length,
            )
        return plan

    @property
    def _admits_nobody(self) -> bool:
        """Whether nobody is there who could be admitted."""
        return not self.waiting or len(self.running) >= self._config.max_num_seqs

    def _plan(self, expired: tuple[SequenceOutput, ...]) -> StepPlan:
        """A step from nothing."""
        budget = self._config.max_num_batched_tokens
        scheduled: list[ScheduledSequence] = []
        num_preempted = 0
        # Decodes first: a long prompt may slow them down, but never stop them.
        for seq in sorted(self.running, key=_is_prefill):
            if budget == 0:
                break
            if seq.status is not SequenceStatus.RUNNING:
                continue
            item = ScheduledSequence.next_of(seq, min(seq.num_uncomputed_tokens, budget))
            end = seq.num_computed_tokens + item.num_tokens
            if not self.block_manager.grow(seq, end):
                num_preempted += self._make_room(seq, end)
            if seq.status is SequenceStatus.RUNNING:
                scheduled.append(item)
                budget -= item.num_tokens
        # A chunk of a prompt may need blocks too, and take them from a decode planned before it.
        scheduled = [item for item in scheduled if item.seq.status is SequenceStatus.RUNNING]
        while budget and not num_preempted and len(self.running) < self._config.max_num_seqs:
            admitted = self._admit_next(budget)
            if admitted is None:
                break
            item = ScheduledSequence.next_of(admitted, min(admitted.num_uncomputed_tokens, budget))
            scheduled.append(item)
            budget -= item.num_tokens
        self._has_changed = len(self.running) < self._config.max_num_seqs and (
            budget == 0 or num_preempted > 0
        )
        # Decodes of like length side by side: they are gathered together, padded to the longest.
        scheduled.sort(
            key=lambda item: item.seq.num_computed_tokens if item.num_tokens == 1 else math.inf
        )
        return StepPlan.of(scheduled, expired, num_preempted)

    def foresee(self, plan: StepPlan) -> StepPlan | None:
        """The step after one whose tokens are not known yet; takes blocks for it.

        It goes on with every sequence that does not surely end. One that turns out to have ended,
        or is aborted, is computed in vain: `update` skips it. Its blocks may be another's by then,
        but only in steps that a device does later.

        Returns:
            None where tokens or listeners have to be waited for: `schedule` decides then.
        """
        running = [
            (item, start + item.num_tokens)
            for item, start in zip(plan.scheduled, plan.starts, strict=True)
            if item.seq.status is SequenceStatus.RUNNING
        ]
        if (
            not all(item.samples for item, _ in running)
            or len(running) < len(self.running)
            or (self.waiting and self._has_changed)
            or self._is_overdue()
        ):
            return None
        following: list[ScheduledSequence] = []
        starts: list[int] = []
        for (seq, _, _), end in running:
            if length_ending(seq, end + 1, self._max_len) is not None:
                continue
            assert seq.params is not None, "only generations sample"
            if seq.params.uses_output or not self.block_manager.grow(seq, end + 1):
                return None
            following.append(ScheduledSequence(seq, 1, samples=True))
            starts.append(end)
        self._decode_run = None
        return StepPlan(tuple(following), tuple(starts)) if following else None

    def update(self, plan: StepPlan, results: SequenceOf[Result]) -> list[SequenceOutput]:
        """Record what a step computed; returns what is new for each sequence."""
        now = self._clock()
        recorded = None
        if self._decode_run is not None:
            recorded = self._decode_run.record(plan, results, now)
        if recorded is not None:
            outputs, self.progress = recorded
            return [*plan.expired, *outputs]
        self.progress = Progress()
        outputs = list(plan.expired)
        for item, result in zip(plan.scheduled, results, strict=True):
            seq, num_tokens, samples = item
            if seq.status is SequenceStatus.FINISHED:  # since the step was foreseen
                continue
            assert seq.status is SequenceStatus.RUNNING, "only running sequences are planned"
            if not isinstance(result, int) and result.failed:
                outputs.append(self._end(seq, FinishReason.ERROR))
                continue
            seq.num_computed_tokens += num_tokens
            self.block_manager.remember(seq, num_tokens)
            if samples:
                outputs.append(self._append(seq, result, now))
            elif seq.params is None:
                assert isinstance(result, StepResult), "only generations get tokens"
                seq.prompt_logprobs.extend(result.prompt_logprobs)
                seq.add_pooled(result.pooled)
                if seq.num_uncomputed_tokens == 0:
                    self.progress.complete_prompt(seq, now)
                    outputs.append(self._end(seq, FinishReason.LENGTH))
        return outputs

    def check_integrity(self) -> None:
        """Check the invariants that hold between steps.

        Raises:
            AssertionError: one of them does not.
        """
        self.block_manager.check_integrity(self._by_id.values())
        waiting = list(self.waiting)
        assert len(waiting) + len(self.running) == len(self._by_id), "a sequence is in no list"
        assert self.running == sorted(self.running, key=lambda seq: seq.order), "running order"
        assert len(self.running) <= self._config.max_num_seqs, "too many running"
        for seq in waiting:
            assert seq.status is SequenceStatus.WAITING, f"waiting sequence is {seq.status}"
            assert not seq.block_tables, "a waiting sequence holds blocks"
            assert seq.num_computed_tokens == 0, "a waiting sequence has computed tokens"
        for seq in self.running:
            assert seq.status is SequenceStatus.RUNNING, f"running sequence is {seq.status}"
            assert seq.num_uncomputed_tokens > 0, "a running sequence has nothing to compute"
            for table in seq.block_tables:
                held = len(table) * self.block_manager.block_size
                assert seq.num_computed_tokens <= held, "computed tokens without blocks"

    def _is_overdue(self) -> bool:
        """Whether a deadline may have passed."""
        return self._clock() >= self._earliest_deadline

    def _expire(self) -> list[SequenceOutput]:
        """End all whose deadline has passed."""
        if not self._is_overdue():
            return []
        now = self._clock()
        overdue = [
            seq for seq in self._by_id.values() if seq.deadline is not None and seq.deadline <= now
        ]
        outputs = [self._end(seq, FinishReason.DEADLINE) for seq in overdue]
        later = (seq.deadline for seq in self._by_id.values() if seq.deadline is not None)
        self._earliest_deadline = min(later, default=math.inf)
        return outputs

    def _make_room(self, seq: Sequence, num_tokens: int) -> int:
        """Preempt from the end of the order until a running sequence has grown, itself at the last.

        Returns:
            How many sequences were preempted.
        """
        num_preempted = 0
        while True:
            victim = self.running[-1]
            self._preempt(victim)
            num_preempted += 1
            if victim is seq or self.block_manager.grow(seq, num_tokens):
                return num_preempted

    def _preempt(self, seq: Sequence) -> None:
        """Take all blocks; the tokens stay and are computed again after the next admission."""
        self.running.remove(seq)
        self._decode_run = None
        self.block_manager.free(seq)
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        seq.forget_results()
        seq.status = SequenceStatus.WAITING
        self.waiting.push(seq)

    def _admit_next(self, budget: int) -> Sequence | None:
        """Move the first waiting sequence that fits to the running ones."""
        if not self.waiting:
            return None
        most = self._config.max_num_batched_tokens
        reserve = self.block_manager.outstanding(self.running, most)
        for seq in self.waiting.candidates():
            if self._whole_prompts and seq.num_tokens > budget:
                continue
            if self.block_manager.admit(
                seq, first_step=budget, max_new_tokens=most, reserve=reserve
            ):
                self.waiting.admit(seq)
                seq.status = SequenceStatus.RUNNING
                if seq.first_scheduled_time is None:
                    seq.first_scheduled_time = self._clock()
                    seq.num_cached_tokens = seq.num_computed_tokens
                bisect.insort(self.running, seq, key=lambda running: running.order)
                return seq
        return None

    def _append(self, seq: Sequence, result: Result, now: float) -> SequenceOutput:
        """Add a sampled token and see whether it is the last."""
        token_id, logprobs = (result, None) if isinstance(result, int) else result[:2]
        assert token_id is not None, "a sampling step has a token"
        seq.token_ids.append(token_id)
        self.progress.add_token(seq, now)
        ending = ending_of(seq, self._eos_token_ids, self._max_len)
        finish = None if ending is None else self._end(seq, *ending).finish
        switch = self._rope_switch_length
        if finish is None and switch is not None and seq.num_tokens == switch + 1:
            self._preempt(seq)
            seq.min_rope_length = seq.num_tokens
        reported = () if logprobs is None else (logprobs,)
        return SequenceOutput(seq.seq_id, (token_id,), reported, finish=finish)

    def _end(
        self, seq: Sequence, reason: FinishReason, matched_stop: str | int | None = None
    ) -> SequenceOutput:
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._decode_run = None
            self.block_manager.free(seq)
        else:
            self.waiting.remove(seq)
        del self._by_id[seq.seq_id]
        self._has_changed = True
        finish = seq.finish(reason, self._clock(), matched_stop)
        self._on_finish(finish)
        return SequenceOutput(
            seq_id=seq.seq_id,
            prompt_logprobs=tuple(seq.prompt_logprobs),
            embedding=tuple(seq.pooled),
            finish=finish,
        )


def _is_prefill(seq: Sequence) -> bool:
    """Whether a running sequence has more to compute than its last token."""
    return len(seq.token_ids) - seq.num_computed_tokens > 1
