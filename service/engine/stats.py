"""What an engine tells its listeners: plain numbers."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from service.engine.sequence import Sequence

Phase: TypeAlias = Literal["decode", "prefill"]


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine is busy with."""

    num_running: int
    num_waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_cached: int


@dataclass(frozen=True, slots=True)
class ComputedPrompt:
    """A prompt whose computation is complete; once per request, whatever is computed again.

    Attributes:
        num_cached_tokens: how many of its tokens the prefix cache supplied.
        first_token: seconds from arrival to the first token; None if none was asked for.
    """

    request_id: str
    num_tokens: int
    num_cached_tokens: int
    first_token: float | None


@dataclass(slots=True)
class Progress:
    """What a step brought its requests.

    Attributes:
        prompts: those that it completed.
        token_gaps: for each new token that is not its request's first, seconds since the one
            before.
    """

    prompts: list[ComputedPrompt] = field(default_factory=list)
    token_gaps: list[float] = field(default_factory=list)

    def complete_prompt(self, seq: Sequence, now: float) -> None:
        seq.first_token_time = now
        first_token = None if seq.params is None else now - seq.arrival_time
        self.prompts.append(
            ComputedPrompt(
                seq.request_id, seq.num_prompt_tokens, seq.num_cached_tokens, first_token
            )
        )

    def add_token(self, seq: Sequence, now: float) -> None:
        if seq.last_token_time is None:
            self.complete_prompt(seq, now)
        else:
            self.token_gaps.append(now - seq.last_token_time)
        seq.last_token_time = now


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step in numbers, for listeners.

    Attributes:
        num_tokens: computed.
        seconds: from planning to the new tokens.
        kv_bytes: keys and values that its queries see, each counted once per sequence.
        load: after the step.
    """

    num_tokens: int
    num_sequences: int
    num_preempted: int
    seconds: float
    kv_bytes: int
    progress: Progress
    load: EngineLoad

    @property
    def phase(self) -> Phase:
        """`decode` if every sequence computed one token."""
        return "decode" if self.num_tokens == self.num_sequences else "prefill"
