"""What a request may ask for. One total validator: every wrong field is found, none is corrected.

Whatever passes here cannot raise later inside a step, where it would harm other requests.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from service.engine.errors import EncoderModelError, InvalidRequestError, Violation
from service.engine.sampling_params import SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_ABS_PRIORITY = 100
MAX_SEED = 2**64 - 1
MAX_TIMEOUT_SECONDS = 3600.0
# Smaller ones are not told from 0 in float32.
MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the served model sets: ids below `vocab_size`, prompt and output in `max_model_len`;
    an encoder (`is_causal` is false) only embeds."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()
    is_causal: bool = True


def require_decoder(limits: ModelLimits) -> None:
    """Raise EncoderModelError if the model can neither generate nor score."""
    if not limits.is_causal:
        raise EncoderModelError


def validate_generation(
    prompt_token_ids: Sequence[int], params: SamplingParams, limits: ModelLimits
) -> None:
    """Check a whole generation request.

    Raises:
        InvalidRequestError: names every wrong field.
    """
    violations = [
        *prompt_violations(prompt_token_ids, limits, max_len=limits.max_model_len - 1),
        *sampling_violations(params, limits, num_prompt_tokens=len(prompt_token_ids)),
    ]
    if violations:
        raise InvalidRequestError(violations)


def prompt_violations(
    token_ids: Sequence[int], limits: ModelLimits, *, max_len: int, field: str = "prompt"
) -> Iterator[Violation]:
    if not token_ids:
        yield Violation(field, "empty", f"1 to {max_len} tokens")
    elif len(token_ids) > max_len:
        yield Violation(
            field,
            f"{len(token_ids)} tokens long",
            f"1 to {max_len} tokens (the model's context is {limits.max_model_len})",
        )
    else:
        yield from token_violations(f"{field}.token_ids", token_ids, limits)


def sampling_violations(
    params: SamplingParams, limits: ModelLimits, *, num_prompt_tokens: int
) -> Iterator[Violation]:
    room = max(limits.max_model_len - num_prompt_tokens, 1)
    most = room
    if params.max_tokens is None:
        pass
    elif 1 <= params.max_tokens <= room:
        most = params.max_tokens
    else:
        yield Violation(
            "sampling.max_tokens",
            str(params.max_tokens),
            f"1 to {room} (context {limits.max_model_len} less {num_prompt_tokens} prompt tokens)",
        )
    if not 0 <= params.min_tokens <= most:
        yield Violation("sampling.min_tokens", str(params.min_tokens), f"0 to {most} (max_tokens)")
    if not 0 <= params.top_k <= limits.vocab_size:
        yield Violation("sampling.top_k", str(params.top_k), f"0 (off) to {limits.vocab_size}")
    if params.logprobs is not None and not 0 <= params.logprobs <= min(
        MAX_LOGPROBS, limits.vocab_size
    ):
        yield Violation("sampling.logprobs", str(params.logprobs), f"0 to {MAX_LOGPROBS}")
    if params.seed is not None and not 0 <= params.seed <= MAX_SEED:
        yield Violation("sampling.seed", str(params.seed), f"0 to {MAX_SEED}")
    yield from _float_violations(params)
    yield from _stop_violations(params, limits)
    yield from token_violations(
        "sampling.allowed_token_ids", params.allowed_token_ids, limits, unique=True
    )
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        yield Violation(
            "sampling.logit_bias", f"{len(params.logit_bias)} entries", f"at most {MAX_LOGIT_BIAS}"
        )
    for token_id, bias in params.logit_bias.items():
        if not 0 <= token_id < limits.vocab_size:
            yield Violation(
                f"sampling.logit_bias[{token_id}]",
                "set for an unknown token",
                f"token ids 0 to {limits.vocab_size - 1}",
            )
            break
        if not -100 <= bias <= 100:  # also refuses NaN
            yield Violation(f"sampling.logit_bias[{token_id}]", str(bias), "-100 to 100")
            break
    yield from _nothing_left_violations(params, limits)


def _nothing_left_violations(params: SamplingParams, limits: ModelLimits) -> Iterator[Violation]:
    """While `min_tokens` holds back every ending, some token must remain to be chosen."""
    if not params.min_tokens:
        return
    ending = {*params.stop_token_ids}
    if not params.ignore_eos:
        ending |= limits.eos_token_ids
    allowed = params.allowed_token_ids or range(limits.vocab_size)
    if len(ending) >= len(allowed) and ending.issuperset(allowed):
        yield Violation(
            "sampling.min_tokens",
            f"{params.min_tokens} while all tokens that may be chosen end the generation",
            "0, or at least one token in allowed_token_ids that is no stop and no end-of-sequence",
        )


def _float_violations(params: SamplingParams) -> Iterator[Violation]:
    if 0 < params.temperature < MIN_TEMPERATURE:
        yield Violation(
            "sampling.temperature",
            f"{params.temperature:g}",
            f"0 (greedy), or {MIN_TEMPERATURE:g} to 100",
        )
    for name, low, high, low_open in (
        ("temperature", 0.0, 100.0, False),
        ("top_p", 0.0, 1.0, True),
        ("min_p", 0.0, 1.0, False),
        ("repetition_penalty", 0.01, 100.0, False),
        ("presence_penalty", -2.0, 2.0, False),
        ("frequency_penalty", -2.0, 2.0, False),
    ):
        value = getattr(params, name)
        inside = math.isfinite(value) and low <= value <= high and not (low_open and value == low)
        if not inside:
            allowed = f"above {low:g}, at most {high:g}" if low_open else f"{low:g} to {high:g}"
            yield Violation(f"sampling.{name}", f"{value:g}", allowed)


def _stop_violations(params: SamplingParams, limits: ModelLimits) -> Iterator[Violation]:
    if len(params.stop) > MAX_STOP_STRINGS:
        yield Violation(
            "sampling.stop", f"{len(params.stop)} strings", f"at most {MAX_STOP_STRINGS}"
        )
    for index, stop in enumerate(params.stop[:MAX_STOP_STRINGS]):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            yield Violation(
                f"sampling.stop[{index}]",
                f"{len(stop)} characters long",
                f"1 to {MAX_STOP_CHARS} characters",
            )
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        yield Violation(
            "sampling.stop_token_ids",
            f"{len(params.stop_token_ids)} ids",
            f"at most {MAX_STOP_TOKEN_IDS}",
        )
    yield from token_violations("sampling.stop_token_ids", params.stop_token_ids, limits)


def token_violations(
    field: str, token_ids: Iterable[int], limits: ModelLimits, *, unique: bool = False
) -> Iterator[Violation]:
    """Name the first id outside of the vocabulary; one is enough to find the mistake."""
    seen: set[int] = set()
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < limits.vocab_size:
            yield Violation(f"{field}[{index}]", str(token_id), f"0 to {limits.vocab_size - 1}")
            return
        if unique and token_id in seen:
            yield Violation(f"{field}[{index}]", f"{token_id} again", "each id once")
            return
        seen.add(token_id)
