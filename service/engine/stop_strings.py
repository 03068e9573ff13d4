"""Stop strings, found in the text that a sequence's tokens make."""

from collections.abc import Callable, Sequence

from models.tokenizer import IncrementalDetokenizer, Tokenizer
from service.engine.sampling_params import SamplingParams


def stop_matcher(
    tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int]
) -> Callable[[int], str | None]:
    """A function that is told each new token and returns the stop string it completes."""
    detokenizer = IncrementalDetokenizer(
        tokenizer, params.stop, min_tokens=params.min_tokens, prompt_token_ids=prompt_token_ids
    )

    def match(token_id: int) -> str | None:
        detokenizer.push((token_id,))
        return detokenizer.matched_stop

    return match
