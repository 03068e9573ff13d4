"""One request inside the engine: its tokens, its blocks, how far it is, how it ended."""

import enum
import hashlib
import random
from array import array
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

from service.engine.sampling_params import SamplingParams

# In a block table: a block that was given back because its tokens left the window.
RELEASED = -1


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class FinishReason(enum.Enum):
    """Why a request ended; every admitted request ends with exactly one."""

    EOS = enum.auto()
    STOP = enum.auto()
    LENGTH = enum.auto()
    CONTEXT_FULL = enum.auto()
    DEADLINE = enum.auto()
    CANCELLED = enum.auto()
    ERROR = enum.auto()


class Pooling(enum.Enum):
    """How the hidden states of a prompt become one vector."""

    MEAN = enum.auto()
    LAST = enum.auto()
    FIRST = enum.auto()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of a chosen token, and of the most likely ones, in nats."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of waiting, of prefill, until the first token, and in total.

    A request that ended before it ran has only waited; one that ended before its first token has
    `first_token` equal to `total`.
    """

    queue: float
    prefill: float
    first_token: float
    total: float


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a request.

    Attributes:
        matched_stop: the stop string or stop token id that ended it, if one did.
        request_id: the client's name for the request.
    """

    reason: FinishReason
    matched_stop: str | int | None
    usage: Usage
    timings: Timings
    request_id: str = ""


class SequenceOutput(NamedTuple):  # made for every token: see plan.py
    """What one step (or several, merged) produced for one sequence.

    Attributes:
        prompt_logprobs: only when scoring: log-probabilities of the tokens after the first.
        embedding: only when embedding, with the finish.
    """

    seq_id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    embedding: tuple[float, ...] = ()
    finish: Finish | None = None

    @staticmethod
    def merge(outputs: "list[SequenceOutput]") -> "SequenceOutput":
        """Join consecutive outputs of one sequence."""
        if len(outputs) == 1:
            return outputs[0]
        return SequenceOutput(
            seq_id=outputs[0].seq_id,
            token_ids=tuple(t for output in outputs for t in output.token_ids),
            logprobs=tuple(t for output in outputs for t in output.logprobs),
            prompt_logprobs=tuple(t for output in outputs for t in output.prompt_logprobs),
            embedding=outputs[-1].embedding,
            finish=outputs[-1].finish,
        )


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request. Only the engine thread touches it.

    Attributes:
        seq_id: grows with arrival.
        params: how to sample; None scores or embeds the prompt instead of continuing it.
        pooling: embeds the prompt; None does not.
        deadline: engine clock time after which the request ends; None never.
        cache_namespace: sequences share cached blocks only within one namespace.
        request_id: the client's name for the request.
        block_tables: for each group of heads, the block of every `block_size` tokens, as int32 in
            a row: a step copies them whole.
        min_rope_length: no token is rotated as if the sequence were shorter than this.
        match_stop: told each new token, returns the stop string it completes.
        num_computed_tokens: tokens whose keys and values are in the cache.
        num_cached_tokens: of these, how many the prefix cache supplied at first admission.
        num_bypassed: later arrivals that were admitted before this one.
        pooled: sum of the contributions to the embedding so far.
    """

    seq_id: int
    token_ids: list[int]
    params: SamplingParams | None
    arrival_time: float
    pooling: Pooling | None = None
    priority: int = 0
    deadline: float | None = None
    cache_namespace: bytes = b""
    request_id: str = ""
    match_stop: Callable[[int], str | None] | None = None
    num_prompt_tokens: int = field(init=False)
    min_rope_length: int = field(init=False)
    status: SequenceStatus = field(default=SequenceStatus.WAITING, init=False)
    block_tables: "list[array[int]]" = field(default_factory=list, init=False)
    block_hashes: list[bytes] = field(default_factory=list, init=False)
    num_computed_tokens: int = field(default=0, init=False)
    num_cached_tokens: int = field(default=0, init=False)
    num_bypassed: int = field(default=0, init=False)
    num_preemptions: int = field(default=0, init=False)
    prompt_logprobs: list[float] = field(default_factory=list, init=False)
    pooled: list[float] = field(default_factory=list, init=False)
    first_scheduled_time: float | None = field(default=None, init=False)
    first_token_time: float | None = field(default=None, init=False)
    last_token_time: float | None = field(default=None, init=False)
    rng: random.Random | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        self.min_rope_length = self.num_prompt_tokens
        if self.params is not None and self.params.temperature > 0:
            self.rng = random.Random(self.params.seed)  # noqa: S311, sampling is no secret

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def order(self) -> tuple[int, float, int]:
        """Sorts by priority (higher first), deadline (earlier first) and arrival."""
        return (
            -self.priority,
            float("inf") if self.deadline is None else self.deadline,
            self.seq_id,
        )

    def add_pooled(self, part: SequenceOf[float]) -> None:
        """Add what some of the tokens contribute to the embedding."""
        if part:
            earlier = self.pooled or [0.0] * len(part)
            self.pooled = [a + b for a, b in zip(earlier, part, strict=True)]

    def forget_results(self) -> None:
        """Before the prompt is computed once more."""
        self.prompt_logprobs.clear()
        self.pooled.clear()

    def hash_blocks(self, num_full: int, block_size: int) -> None:
        """Know the digests of the first `num_full` blocks of tokens.

        Digests chain: equal ones mean an equal namespace and equal tokens from the start.
        """
        for index in range(len(self.block_hashes), num_full):
            parent = (
                self.block_hashes[-1]
                if self.block_hashes
                else hashlib.sha256(self.cache_namespace).digest()
            )
            start = index * block_size
            tokens = array("q", self.token_ids[start : start + block_size])
            self.block_hashes.append(hashlib.sha256(parent + tokens.tobytes()).digest())

    def finish(
        self, reason: FinishReason, now: float, matched_stop: str | int | None = None
    ) -> Finish:
        """Mark as finished and describe the end."""
        assert self.status is not SequenceStatus.FINISHED, "a sequence ends once"
        self.status = SequenceStatus.FINISHED
        scheduled = now if self.first_scheduled_time is None else self.first_scheduled_time
        first_token = now if self.first_token_time is None else self.first_token_time
        return Finish(
            reason=reason,
            matched_stop=matched_stop,
            usage=Usage(
                prompt_tokens=self.num_prompt_tokens,
                completion_tokens=self.num_output_tokens,
                cached_tokens=self.num_cached_tokens,
            ),
            timings=Timings(
                queue=scheduled - self.arrival_time,
                prefill=first_token - scheduled,
                first_token=first_token - self.arrival_time,
                total=now - self.arrival_time,
            ),
            request_id=self.request_id,
        )
