"""How the tokens of one request are chosen and when they end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)  # no slots: every token asks the properties, which are kept
class SamplingParams:
    """Sampling settings of one request; `validation` says what is allowed.

    Attributes:
        max_tokens: generate at most so many tokens; None generates until the model ends or its
            context is full.
        min_tokens: neither end-of-sequence nor any stop before so many tokens.
        temperature: 0 is greedy.
        top_k: sample among the k most likely tokens; 0 is off.
        top_p: sample among the most likely tokens that together reach this probability.
        min_p: drop tokens less likely than this share of the most likely one.
        repetition_penalty: above 1 discourages tokens of prompt and output; 1 is off.
        presence_penalty: subtracted from logits of tokens that the output contains.
        frequency_penalty: subtracted once per occurrence in the output.
        seed: the same seed and request give the same tokens; None draws one.
        stop: strings that end the generation; not part of the returned text.
        stop_token_ids: tokens that end the generation; part of the returned ids.
        ignore_eos: go on after the model's end-of-sequence token.
        logprobs: report the chosen token's log-probability and so many alternatives.
        logit_bias: added to the logits of these tokens.
        allowed_token_ids: choose among these only; empty allows all.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()

    @cached_property
    def is_plainly_greedy(self) -> bool:
        """Whether the likeliest token is taken as the model says, and nothing is reported of it."""
        return (
            self.temperature == 0.0
            and self.repetition_penalty == 1.0
            and self.logprobs is None
            and not (self.presence_penalty or self.frequency_penalty)
            and not (self.logit_bias or self.allowed_token_ids)
        )

    @cached_property
    def uses_output(self) -> bool:
        """Whether a token's chances are edited for the tokens that were chosen before it."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def max_kv_tokens(self, num_prompt_tokens: int) -> int:
        """Cache slots that a request takes at most, as far as that is known in advance."""
        # The last token is never read back.
        return num_prompt_tokens + (1 if self.max_tokens is None else self.max_tokens) - 1
