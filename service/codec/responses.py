"""What the engine produced, as messages of GenerationService."""

import math

from google.protobuf.duration_pb2 import Duration

from protos.headroom.v1 import generation_pb2 as pb
from service.engine.sequence import Finish, FinishReason, SequenceOutput, TokenLogprobs

_FINISH_REASONS = {
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CONTEXT_FULL: pb.FINISH_REASON_CONTEXT_FULL,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}


def token_delta(output: SequenceOutput, text: str) -> pb.TokenDelta:
    return pb.TokenDelta(
        token_ids=output.token_ids, text=text, logprobs=map(token_logprobs, output.logprobs)
    )


def token_logprobs(logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        logprob=logprobs.logprob,
        top=[
            pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top
        ],
    )


def finished(finish: Finish) -> pb.Finished:
    matched = finish.matched_stop
    return pb.Finished(
        reason=_FINISH_REASONS[finish.reason],
        matched_stop=matched if isinstance(matched, str) else None,
        matched_stop_token_id=matched if isinstance(matched, int) else None,
        usage=usage(finish),
        timings=pb.Timings(
            queue=_duration(finish.timings.queue),
            prefill=_duration(finish.timings.prefill),
            first_token=_duration(finish.timings.first_token),
            total=_duration(finish.timings.total),
        ),
    )


def embedding(output: SequenceOutput, *, normalize: bool) -> list[float]:
    """The pooled vector; one of length 0 has no direction and stays as it is."""
    norm = math.hypot(*output.embedding) if normalize else 1.0
    return [number / (norm or 1.0) for number in output.embedding]


def usage(finish: Finish) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=finish.usage.prompt_tokens,
        completion_tokens=finish.usage.completion_tokens,
        cached_tokens=finish.usage.cached_tokens,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
