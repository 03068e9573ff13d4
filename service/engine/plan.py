"""What one step is to do, and what the model said: between scheduler and model runner."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from service.engine.sequence import Sequence, SequenceOutput, TokenLogprobs

# What is made for every sequence of every step is a tuple: made in half the time of a frozen
# dataclass. What is asked of it for every sequence asks no other property: each is a call.


class ScheduledSequence(NamedTuple):
    """The next uncomputed tokens of a sequence are part of the step.

    Attributes:
        num_tokens: how many of them.
        samples: whether the last token of a generation is among them, so that a new one follows.
    """

    seq: Sequence
    num_tokens: int
    samples: bool

    @classmethod
    def next_of(cls, seq: Sequence, num_tokens: int) -> "ScheduledSequence":
        """The first so many of the tokens that are not computed yet."""
        return cls(
            seq, num_tokens, seq.params is not None and num_tokens == seq.num_uncomputed_tokens
        )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step does.

    Attributes:
        scheduled: sequences with exactly one token first, then the others.
        starts: of each of them, tokens that were computed before.
        expired: outputs of sequences whose deadline has passed; they do not run.
        num_preempted: sequences that lost their blocks to others.
        changed: if this step goes on with the decodes of the step before, with each of them and no
            other, which of them may have other blocks than then; None is any other step.
    """

    scheduled: tuple[ScheduledSequence, ...]
    starts: tuple[int, ...]
    expired: tuple[SequenceOutput, ...] = ()
    num_preempted: int = 0
    changed: tuple[int, ...] | None = None

    @staticmethod
    def of(
        scheduled: Iterable[ScheduledSequence],
        expired: tuple[SequenceOutput, ...] = (),
        num_preempted: int = 0,
    ) -> "StepPlan":
        """Sequences as far as they are computed now."""
        items = tuple(scheduled)
        starts = tuple([item.seq.num_computed_tokens for item in items])
        return StepPlan(items, starts, expired, num_preempted)

    @property
    def num_tokens(self) -> int:
        if self.changed is not None:
            return len(self.scheduled)
        return sum(item.num_tokens for item in self.scheduled)

    @property
    def is_decode(self) -> bool:
        """Whether each sequence computes one token and gets one."""
        return self.changed is not None or all(
            item.num_tokens == 1 and item.samples for item in self.scheduled
        )


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


# A token of which nothing else is to be said, as most are, is its id.
Result: TypeAlias = StepResult | int
