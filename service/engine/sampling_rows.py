"""How the sequences of a step choose their next tokens, in the sampler's terms."""

from collections.abc import Iterable

from models.sampler import SamplingRow
from service.engine.plan import StepPlan
from service.engine.sequence import Sequence

# Most rows of many a load: made once, since a row has more fields than it takes time to look at.
_GREEDY = SamplingRow(temperature=0.0)


class SamplingRows:
    """What the settings of requests mean for the next token.

    Args:
        eos_token_ids: tokens with which the model ends.
    """

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = tuple(sorted(eos_token_ids))
        self._are_greedy = False

    def of(self, plan: StepPlan, sampled: Iterable[int]) -> list[SamplingRow] | None:
        """One for each sequence that gets a token; None if all take the likeliest as the model
        says, and nothing is reported of it. Is asked once about each step with tokens.

        Args:
            sampled: which of the planned sequences get one.
        """
        if plan.changed is not None and self._are_greedy:  # and so they stay
            return None
        rows = [
            self._row(item.seq, plan.starts[index] + item.num_tokens)
            for index in sampled
            for item in (plan.scheduled[index],)
        ]
        self._are_greedy = all(row is _GREEDY for row in rows)
        return None if self._are_greedy else rows

    def _row(self, seq: Sequence, num_tokens: int) -> SamplingRow:
        """How the token behind so many is chosen; the host may not know the last of them yet."""
        params = seq.params
        assert params is not None, "only generations sample"
        is_early = num_tokens - seq.num_prompt_tokens < params.min_tokens
        if params.is_plainly_greedy and not is_early:
            return _GREEDY
        suppressed: tuple[int, ...] = ()
        if is_early:
            suppressed = params.stop_token_ids
            if not params.ignore_eos:
                suppressed += self._eos_token_ids
        return SamplingRow(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.logit_bias,
            allowed_token_ids=params.allowed_token_ids,
            suppressed_token_ids=suppressed,
            prompt_token_ids=seq.token_ids[: seq.num_prompt_tokens]
            if params.repetition_penalty != 1.0
            else (),
            output_token_ids=seq.token_ids[seq.num_prompt_tokens :] if params.uses_output else (),
            uniform=0.0 if seq.rng is None else seq.rng.random(),
            num_logprobs=params.logprobs,
        )
