"""Stand-ins for time and for the model: small, typed, without a tensor."""

import itertools
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf

from service.engine.block_manager import BlockManager
from service.engine.config import EngineConfig
from service.engine.group_pool import BlockGroup
from service.engine.plan import Result, ScheduledSequence, StepPlan, StepResult
from service.engine.sampling_params import SamplingParams
from service.engine.scheduler import Scheduler
from service.engine.sequence import (
    RELEASED,
    FinishReason,
    Sequence,
    SequenceOutput,
    SequenceStatus,
)

VOCAB_SIZE = 50
EOS = 0
GREEDY = SamplingParams(temperature=0.0)
# One group of heads that remember everything.
EVERYTHING = (BlockGroup(),)


class FakeClock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def _digest(previous: int, token_id: int) -> int:
    return zlib.crc32(struct.pack("<Iq", previous, token_id))


def _visible(group: BlockGroup, query: int) -> list[int]:
    """The positions that a query of this group looks at."""
    window = query + 1 if group.window is None else group.window
    return [at for at in range(query + 1) if query - at < window or at < group.sink_tokens]


def _content(previous: int | None, token_id: int) -> int:
    """What the cache slot of a token holds; `previous` is the slot before, if it is visible."""
    return _digest(previous or 0, token_id)


def _read(contents: Iterable[int]) -> int:
    """What a query makes of all that it sees."""
    return zlib.crc32(b"".join(struct.pack("<I", content) for content in contents))


def _reads(token_ids: SequenceOf[int], groups: SequenceOf[BlockGroup]) -> list[int]:
    """What the query of each token reads, if nothing goes wrong."""
    cached: list[list[int]] = [[] for _ in groups]
    reads: list[int] = []
    for at, token_id in enumerate(token_ids):
        seen: list[int] = []
        for group, contents in zip(groups, cached, strict=True):
            visible = _visible(group, at)
            contents.append(_content(contents[-1] if at - 1 in visible else None, token_id))
            seen.extend(contents[position] for position in visible)
        reads.append(_read(seen))
    return reads


def _logprob(read: int, token_id: int) -> float:
    return -float(_digest(read, token_id) % 1000)


def continuation(
    prompt: SequenceOf[int], num_tokens: int, groups: SequenceOf[BlockGroup] = EVERYTHING
) -> list[int]:
    """The tokens with which `FakeModelRunner` continues a prompt, whatever runs beside it."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(_reads(token_ids, groups)[-1] % VOCAB_SIZE)
    return token_ids[len(prompt) :]


def scores(prompt: SequenceOf[int], groups: SequenceOf[BlockGroup] = EVERYTHING) -> list[float]:
    """The log-probabilities that `FakeModelRunner` gives the tokens of a prompt."""
    reads = _reads(prompt, groups)[:-1]
    return [_logprob(read, token) for read, token in zip(reads, prompt[1:], strict=True)]


class FakeModelRunner:
    """The interface of `ModelRunner` over a cache of integers.

    In each group of heads a cache slot holds a digest of all tokens up to its own, made from the
    slot before; the next token is a digest of all slots that the block tables lead to, as far as
    the windows let it see. A block that is lost, shared or freed by mistake changes what follows,
    or cannot be read at all.

    Attributes:
        scripts: output tokens by sequence id, instead of digests; None is a failure.
        failing: ids of sequences whose numbers are not finite from now on.
    """

    def __init__(self, block_size: int, groups: SequenceOf[BlockGroup] = EVERYTHING) -> None:
        self.scripts: dict[int, SequenceOf[int | None]] = {}
        self.failing: set[int] = set()
        self._block_size = block_size
        self._groups = groups
        # The group that wrote to a page last, and its slots: it overwrites all others.
        self._pages: dict[int, tuple[int, dict[int, int]]] = {}

    def run(self, plan: StepPlan, before: Mapping[int, int | None] | None = None) -> list[Result]:
        """Args:
        before: of a foreseen plan, tokens of the step before by sequence id.
        """
        return [
            self._run(item, start, (before or {}).get(item.seq.seq_id))
            for item, start in zip(plan.scheduled, plan.starts, strict=True)
        ]

    def _run(self, item: ScheduledSequence, start: int, newest: int | None) -> Result:
        seq, end = item.seq, start + item.num_tokens
        for position in range(start, end):
            known = position < seq.num_tokens
            self._write(seq, position, seq.token_ids[position] if known else newest or 0)
        if seq.seq_id in self.failing:
            return StepResult(failed=True)
        if seq.params is None:
            targets = range(start + 1, min(end + 1, seq.num_tokens))
            return StepResult(
                prompt_logprobs=tuple(
                    _logprob(self._look(seq, at - 1), seq.token_ids[at]) for at in targets
                )
            )
        if not item.samples:
            return StepResult()
        if seq.seq_id in self.scripts:
            at = end - seq.num_prompt_tokens
            script = self.scripts[seq.seq_id]
            token_id = script[at] if at < len(script) else 0  # behind its end
            return StepResult(failed=True) if token_id is None else token_id
        return self._look(seq, end - 1) % VOCAB_SIZE

    def _write(self, seq: Sequence, position: int, token_id: int) -> None:
        for index, group in enumerate(self._groups):
            visible = position - 1 in _visible(group, position)
            previous = self._slot(seq, index, position - 1) if visible else None
            page, slot = self._place(seq, index, position)
            owner, slots = self._pages.get(page, (index, {}))
            if owner != index:
                slots = {}
            slots[slot] = _content(previous, token_id)
            self._pages[page] = (index, slots)

    def _look(self, seq: Sequence, query: int) -> int:
        return _read(
            self._slot(seq, index, position)
            for index, group in enumerate(self._groups)
            for position in _visible(group, query)
        )

    def _slot(self, seq: Sequence, index: int, position: int) -> int:
        page, slot = self._place(seq, index, position)
        owner, slots = self._pages[page]
        assert owner == index, f"page {page} of group {index} was overwritten by group {owner}"
        return slots[slot]

    def _place(self, seq: Sequence, index: int, position: int) -> tuple[int, int]:
        """Page and slot of a position in one group."""
        block = seq.block_tables[index][position // self._block_size]
        assert block != RELEASED, f"position {position} is needed, and its block was given back"
        slot = block * self._block_size + position % self._block_size
        return block // self._groups[index].blocks_per_page, slot


class SchedulerLoop:
    """A scheduler, a fake model and a fake clock, stepped by hand; every step is checked.

    Args:
        foresees: each step is run before the tokens of the one before are recorded.

    Attributes:
        outputs: what each sequence has got so far.
        num_foreseen: steps that were run so, and recorded.
        plans: of each step, the number of tokens by sequence id.
        num_preempted: over all steps.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        max_model_len: int = 1000,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        max_waiting_requests: int = 256,
        max_waiting_tokens: int = 10_000,
        max_bypass: int = 64,
        enable_prefix_caching: bool = False,
        groups: tuple[BlockGroup, ...] = EVERYTHING,
        rope_switch_length: int | None = None,
        foresees: bool = False,
    ) -> None:
        self.foresees = foresees
        self.num_foreseen = 0
        self._foreseen: tuple[StepPlan, list[Result]] | None = None
        self.config = EngineConfig(
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_waiting_requests=max_waiting_requests,
            max_waiting_tokens=max_waiting_tokens,
            max_bypass=max_bypass,
            enable_prefix_caching=enable_prefix_caching,
        )
        self.clock = FakeClock()
        self.runner = FakeModelRunner(block_size, groups)
        self.blocks = BlockManager(
            num_blocks, block_size, enable_prefix_caching=enable_prefix_caching, groups=groups
        )
        self.scheduler = Scheduler(
            self.config,
            self.blocks,
            max_model_len=max_model_len,
            eos_token_ids=frozenset({EOS}),
            rope_switch_length=rope_switch_length,
            clock=self.clock,
        )
        self.outputs: dict[int, list[SequenceOutput]] = {}
        self.plans: list[dict[int, int]] = []
        self.num_preempted = 0
        self._seq_ids = itertools.count()

    def add(
        self,
        prompt: SequenceOf[int],
        params: SamplingParams | None = GREEDY,
        *,
        priority: int = 0,
        deadline: float | None = None,
        cache_namespace: bytes = b"",
        match_stop: Callable[[int], str | None] | None = None,
        script: SequenceOf[int | None] | None = None,
    ) -> Sequence:
        seq = Sequence(
            seq_id=next(self._seq_ids),
            token_ids=list(prompt),
            params=params,
            arrival_time=self.clock(),
            priority=priority,
            deadline=deadline,
            cache_namespace=cache_namespace,
            match_stop=match_stop,
        )
        if script is not None:
            self.runner.scripts[seq.seq_id] = script
        self.scheduler.add(seq)
        self.outputs[seq.seq_id] = []
        return seq

    def abort(self, seq: Sequence, reason: FinishReason = FinishReason.CANCELLED) -> None:
        output = self.scheduler.abort(seq.seq_id, reason)
        if output is not None:
            self.outputs[seq.seq_id].append(output)
        self.scheduler.check_integrity()

    def step(self) -> dict[int, int]:
        """Run one step; returns the number of tokens by sequence id."""
        plan, results = self._launch()
        scheduled = {item.seq.seq_id: item.num_tokens for item in plan.scheduled}
        following = self.scheduler.foresee(plan) if self.foresees else None
        if following is not None:
            tokens = {
                item.seq.seq_id: result if isinstance(result, int) else None
                for item, result in zip(plan.scheduled, results, strict=True)
            }
            self._foreseen = following, self.runner.run(following, tokens)
        for output in self.scheduler.update(plan, results):
            self.outputs[output.seq_id].append(output)
        self.scheduler.check_integrity()
        self.plans.append(scheduled)
        self.num_preempted += plan.num_preempted
        return scheduled

    def _launch(self) -> tuple[StepPlan, list[Result]]:
        """The step that was foreseen, unless all it is for have ended; else a new one."""
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and any(
            item.seq.status is not SequenceStatus.FINISHED for item in foreseen[0].scheduled
        ):
            self.num_foreseen += 1
            return foreseen
        plan = self.scheduler.schedule()
        return plan, self.runner.run(plan)

    def drain(self, max_steps: int = 2000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished:
                return
            self.step()
        raise AssertionError(f"requests are unfinished after {max_steps} steps")

    def num_finishes(self, seq: Sequence) -> int:
        return sum(output.finish is not None for output in self.outputs[seq.seq_id])

    def result(self, seq: Sequence) -> SequenceOutput:
        """All that a finished sequence got, as one."""
        assert self.num_finishes(seq) == 1, "a finished sequence has one finish"
        return SequenceOutput.merge(self.outputs[seq.seq_id])

    def reason(self, seq: Sequence) -> FinishReason:
        finish = self.result(seq).finish
        assert finish is not None
        return finish.reason
