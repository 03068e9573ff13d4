"""What callers give, as messages of GenerationService."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar

from google.protobuf.duration_pb2 import Duration

from protos.headroom.v1 import generation_pb2 as pb

T = TypeVar("T")
Prompt: TypeAlias = str | Sequence[int]
Pooling: TypeAlias = Literal["mean", "last", "first"]


class Sampling(TypedDict, total=False):
    """Fields of `headroom.v1.SamplingParams`; see generation.proto for ranges and defaults."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What surrounds a request: its id, its urgency, and how long it may take on the server."""

    request_id: str = ""
    priority: int = 0
    timeout: float | None = None


def generation_request(
    message: Callable[..., T],
    prompt: Prompt,
    options: RequestOptions | None,
    sampling: Mapping[str, Any],
) -> T:
    return _request(message, prompt, options, sampling=pb.SamplingParams(**sampling))


def score_request(text: Prompt, options: RequestOptions | None) -> pb.ScoreRequest:
    return _request(pb.ScoreRequest, text, options)


def embed_request(
    text: Prompt, pooling: Pooling, normalize: bool, options: RequestOptions | None
) -> pb.EmbedRequest:
    fields = {"pooling": f"POOLING_{pooling.upper()}", "normalize": normalize}
    return _request(pb.EmbedRequest, text, options, **fields)


def _request(
    message: Callable[..., T], prompt: Prompt, options: RequestOptions | None, **fields: Any
) -> T:
    options = options or RequestOptions()
    request: Any = message(request_id=options.request_id, priority=options.priority, **fields)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    if options.timeout is not None:
        if not math.isfinite(options.timeout):
            raise ValueError(f"timeout is {options.timeout}; allowed: a finite number of seconds")
        duration = Duration()
        duration.FromNanoseconds(round(options.timeout * 1e9))
        request.timeout.CopyFrom(duration)
    return request  # type: ignore[no-any-return]
