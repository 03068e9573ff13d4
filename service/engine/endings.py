"""When a generation ends by itself."""

from collections.abc import Container, Iterable

from service.engine.sequence import FinishReason, Sequence


def ending_of(
    seq: Sequence, eos_token_ids: Container[int], max_len: int
) -> tuple[FinishReason, str | int | None] | None:
    """Why the newest token of a generation is its last one, and what it matched; None if it is not.

    Args:
        max_len: tokens of the longest sequence.
    """
    params, token_id = seq.params, seq.token_ids[-1]
    assert params is not None, "only generations sample"
    matched = seq.match_stop(token_id) if seq.match_stop else None
    if matched is not None:
        return FinishReason.STOP, matched
    num_tokens = len(seq.token_ids)
    if num_tokens - seq.num_prompt_tokens >= params.min_tokens:
        if token_id in params.stop_token_ids:
            return FinishReason.STOP, token_id
        if token_id in eos_token_ids and not params.ignore_eos:
            return FinishReason.EOS, None
    length = length_ending(seq, num_tokens, max_len)
    return None if length is None else (length, None)


def last_token_ids(seq: Sequence, eos_token_ids: Iterable[int]) -> Iterable[int]:
    """Tokens that end a generation, once it is as long as it has to be."""
    params = seq.params
    assert params is not None, "only generations sample"
    return params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos_token_ids)


def last_length(seq: Sequence, max_len: int) -> int:
    """Tokens with which a generation ends, whatever they are."""
    params = seq.params
    assert params is not None, "only generations sample"
    return (
        max_len
        if params.max_tokens is None
        else min(seq.num_prompt_tokens + params.max_tokens, max_len)
    )


def length_ending(seq: Sequence, num_tokens: int, max_len: int) -> FinishReason | None:
    """Why a generation ends that has grown to so many tokens, whatever they are."""
    params = seq.params
    assert params is not None, "only generations sample"
    if num_tokens < last_length(seq, max_len):
        return None
    asked_for = params.max_tokens
    if asked_for is not None and num_tokens - seq.num_prompt_tokens >= asked_for:
        return FinishReason.LENGTH
    return FinishReason.CONTEXT_FULL
