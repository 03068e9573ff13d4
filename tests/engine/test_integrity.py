"""Random lives of a scheduler: nothing is lost, nothing ends twice, nothing changes an output."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service.engine.errors import NeverFitsError, QueueFullError
from service.engine.group_pool import BlockGroup
from service.engine.sampling_params import SamplingParams
from service.engine.sequence import FinishReason, Sequence
from tests.fakes import EOS, SchedulerLoop, continuation, scores

BLOCK_SIZE = 4
MAX_MODEL_LEN = 40
# Everything; a window; both, with pages that they cut differently.
GROUPS = [
    (BlockGroup(),),
    (BlockGroup(window=7),),
    (BlockGroup(blocks_per_page=2), BlockGroup(window=5, sink_tokens=3, blocks_per_page=3)),
]
INTERRUPTED = (FinishReason.CANCELLED, FinishReason.DEADLINE)

# Three texts that part after 13 and after 22 tokens; prompts are beginnings of them.
TEXTS = [[1] * 39, [1] * 13 + [2] * 26, [1] * 22 + [3] * 17]
PROMPTS = st.builds(
    lambda text, length: text[:length], st.sampled_from(TEXTS), st.integers(1, MAX_MODEL_LEN - 1)
)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 25),
    min_tokens=st.integers(0, 3),
    temperature=st.just(0.0),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (3, 4, 5), (EOS, 6)]),
)


def expected_end(
    prompt: list[int], params: SamplingParams, max_len: int, groups: tuple[BlockGroup, ...]
) -> tuple[list[int], FinishReason]:
    """Output and end of a request that has the engine for itself, from the definition."""
    output: list[int] = []
    while True:
        output += continuation([*prompt, *output], 1, groups)
        if len(output) >= params.min_tokens:
            if output[-1] in params.stop_token_ids:
                return output, FinishReason.STOP
            if output[-1] == EOS and not params.ignore_eos:
                return output, FinishReason.EOS
        if len(output) == params.max_tokens:
            return output, FinishReason.LENGTH
        if len(prompt) + len(output) == max_len:
            return output, FinishReason.CONTEXT_FULL


class SchedulerLives(RuleBasedStateMachine):
    """Requests come, are computed, cancelled and late, in any order."""

    loop: SchedulerLoop

    def __init__(self) -> None:
        super().__init__()
        self.seqs: list[Sequence] = []

    @initialize(
        num_blocks=st.integers(4, 20),
        max_num_seqs=st.integers(1, 6),
        extra_tokens=st.integers(0, 30),
        max_bypass=st.integers(0, 3),
        caching=st.booleans(),
        groups=st.sampled_from(GROUPS),
        foresees=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        max_num_seqs: int,
        extra_tokens: int,
        max_bypass: int,
        caching: bool,
        groups: tuple[BlockGroup, ...],
        foresees: bool,
    ) -> None:
        self.groups = groups
        self.loop = SchedulerLoop(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_tokens,
            max_bypass=max_bypass,
            max_waiting_requests=12,
            max_waiting_tokens=200,
            enable_prefix_caching=caching,
            groups=groups,
            foresees=foresees,
        )
        budget = max_num_seqs + extra_tokens
        self.capacity = self.loop.blocks.max_tokens(MAX_MODEL_LEN, budget)
        self.max_len = min(MAX_MODEL_LEN, self.capacity + 1)

    @rule(
        prompt=PROMPTS,
        params=st.sampled_from(["score", *["generate"] * 4]).flatmap(
            lambda kind: st.none() if kind == "score" else PARAMS
        ),
        priority=st.integers(-1, 1),
        patience=st.sampled_from([None, None, 3, 20]),
        cache_namespace=st.sampled_from([b"", b"", b"", b"other"]),
    )
    def add(
        self,
        prompt: list[int],
        params: SamplingParams | None,
        priority: int,
        patience: int | None,
        cache_namespace: bytes,
    ) -> None:
        num_slots = len(prompt) + (params.max_tokens or 1) - 1 if params else len(prompt)
        fits = num_slots <= self.capacity
        has_room = self.loop.scheduler.has_room_for(len(prompt))
        try:
            seq = self.loop.add(
                prompt,
                params,
                priority=priority,
                deadline=None if patience is None else self.loop.clock() + patience,
                cache_namespace=cache_namespace,
            )
        except NeverFitsError:
            assert not fits
        except QueueFullError:
            assert fits
            assert not has_room
        else:
            assert fits
            assert has_room
            self.seqs.append(seq)

    @rule(index=st.integers(0, 99))
    def abort(self, index: int) -> None:
        """Any request, also one that has ended already."""
        if index < len(self.seqs):
            self.loop.abort(self.seqs[index])

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds: int) -> None:
        self.loop.clock.advance(seconds)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.step_once()

    def step_once(self) -> None:
        scheduler, now = self.loop.scheduler, self.loop.clock()
        late = [
            seq
            for seq in [*scheduler.running, *scheduler.waiting]
            if seq.deadline is not None and seq.deadline <= now
        ]
        num_foreseen = self.loop.num_foreseen
        scheduled = self.loop.step()
        assert sum(scheduled.values()) <= self.loop.config.max_num_batched_tokens
        if self.loop.num_foreseen == num_foreseen:  # it was planned now
            assert not {seq.seq_id for seq in late} & set(scheduled)
        if scheduler.has_unfinished:
            assert scheduled or late, "with work there is progress"

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "loop"):
            self.loop.scheduler.check_integrity()
            for seq in self.loop.scheduler.waiting:
                assert seq.num_bypassed <= self.loop.config.max_bypass

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        while self.loop.scheduler.has_unfinished:
            self.step_once()
        assert self.loop.blocks.num_used_pages == 0
        assert self.loop.blocks.num_free_pages == self.loop.blocks.num_pages
        for seq in self.seqs:
            self.check_end(seq)

    def check_end(self, seq: Sequence) -> None:
        result, reason = self.loop.result(seq), self.loop.reason(seq)
        prompt = seq.token_ids[: seq.num_prompt_tokens]
        if seq.params is None:
            assert result.token_ids == ()
            expected_logprobs = scores(prompt, self.groups)
            if reason not in INTERRUPTED:
                assert reason is FinishReason.LENGTH
                assert list(result.prompt_logprobs) == expected_logprobs
            num_told = len(result.prompt_logprobs)
            assert list(result.prompt_logprobs) == expected_logprobs[:num_told]
            return
        expected, expected_reason = expected_end(prompt, seq.params, self.max_len, self.groups)
        if reason not in INTERRUPTED:
            assert reason is expected_reason
            assert list(result.token_ids) == expected
        assert list(result.token_ids) == expected[: len(result.token_ids)]
        assert result.finish is not None
        assert result.finish.usage.completion_tokens == len(result.token_ids)


TestSchedulerLives = SchedulerLives.TestCase
TestSchedulerLives.settings = settings(max_examples=300, stateful_step_count=40)
