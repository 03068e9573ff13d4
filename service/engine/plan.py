"""What one step is to do, and what the model said: between scheduler and model runner."""

from dataclasses import dataclass
from typing import NamedTuple

from service.engine.sequence import Sequence, SequenceOutput, TokenLogprobs

# What is made for every sequence of every step is a tuple: made in half the time of a frozen
# dataclass. What is asked of it for every sequence asks no other property: each is a call.


class ScheduledSequence(NamedTuple):
    """The next uncomputed tokens of a sequence are part of the step.

    Attributes:
        num_tokens: how many of them.
        start: tokens of the sequence that were computed before.
        samples: whether the last token of a generation is among them, so that a new one follows.
    """

    seq: Sequence
    num_tokens: int
    start: int
    samples: bool

    @classmethod
    def next_of(cls, seq: Sequence, num_tokens: int) -> "ScheduledSequence":
        """The first so many of the tokens that are not computed yet."""
        start = seq.num_computed_tokens
        samples = seq.params is not None and start + num_tokens == len(seq.token_ids)
        return cls(seq, num_tokens, start, samples)

    @property
    def end(self) -> int:
        """Tokens of the sequence that are computed after the step."""
        return self.start + self.num_tokens

    @property
    def num_unknown(self) -> int:
        """Tokens that a step before chooses and that the host does not know yet: 1, or none."""
        return max(self.start + self.num_tokens - len(self.seq.token_ids), 0)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step does.

    Attributes:
        scheduled: sequences with exactly one token first, then the others.
        expired: outputs of sequences whose deadline has passed; they do not run.
        num_preempted: sequences that lost their blocks to others.
    """

    scheduled: tuple[ScheduledSequence, ...]
    expired: tuple[SequenceOutput, ...]
    num_preempted: int

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.scheduled)


class StepResult(NamedTuple):
    """What the model said about one scheduled sequence.

    Attributes:
        token_id: the sampled token; None if none was due.
        logprobs: of the sampled token, if asked for.
        prompt_logprobs: when scoring, log-probabilities of the tokens after the computed ones.
        pooled: when embedding, what the computed tokens contribute; empty is nothing.
        failed: the model's numbers for this sequence were not finite.
    """

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[float, ...] = ()
    pooled: tuple[float, ...] = ()
    failed: bool = False
