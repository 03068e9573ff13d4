"""Protobuf to domain and back. Every field of a message is checked, all of them at once."""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from models.tokenizer import Tokenizer
from protos.headroom.v1 import generation_pb2 as pb
from protos.headroom.v1 import models_pb2
from service.engine.engine import Engine, EngineLoad, EngineRequest
from service.engine.errors import InvalidRequestError, Violation
from service.engine.sampling_params import SamplingParams
from service.engine.sequence import Finish, FinishReason, SequenceOutput, TokenLogprobs
from service.engine.validation import (
    MAX_ABS_PRIORITY,
    MAX_TIMEOUT_SECONDS,
    ModelLimits,
    prompt_violations,
    sampling_violations,
    token_violations,
)

MAX_REQUEST_ID_CHARS = 128
# No tokenizer in use averages more; longer text is refused before it is tokenized.
_MAX_BYTES_PER_TOKEN = 16

_FINISH_REASONS = {
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CONTEXT_FULL: pb.FINISH_REASON_CONTEXT_FULL,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}


@dataclass(frozen=True, slots=True)
class Call:
    """A checked request: its id, and what the engine is to do."""

    request_id: str
    engine_request: EngineRequest


class RequestDecoder:
    """Reads requests for one model.

    Args:
        tokenizer: the model's.
        limits: the model's.
    """

    def __init__(self, tokenizer: Tokenizer, limits: ModelLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._max_text_bytes = limits.max_model_len * _MAX_BYTES_PER_TOKEN

    def generation(self, request: pb.GenerateRequest | pb.CompleteRequest) -> Call:
        """Check a generation request.

        Raises:
            InvalidRequestError: names every wrong field.
        """
        params = _sampling_params(request.sampling)
        token_ids, violations = self._token_ids(request.WhichOneof("prompt"), request, "prompt")
        max_len = self._limits.max_model_len - 1
        if not violations:
            violations = list(prompt_violations(token_ids, self._limits, max_len=max_len))
        # After a wrong prompt the room for output is unknown; take all of it.
        known = 0 if violations else len(token_ids)
        violations += sampling_violations(params, self._limits, num_prompt_tokens=known)
        return self._call(request, token_ids, params, violations)

    def scoring(self, request: pb.ScoreRequest) -> Call:
        """Check a scoring request.

        Raises:
            InvalidRequestError: names every wrong field.
        """
        token_ids, violations = self._token_ids(request.WhichOneof("input"), request, "input")
        max_len = self._limits.max_model_len
        if not violations:
            violations = list(
                prompt_violations(token_ids, self._limits, max_len=max_len, field="input")
            )
        if len(token_ids) == 1:
            violations.append(
                Violation("input", "1 token long", f"2 to {max_len} tokens: the first has no score")
            )
        return self._call(request, token_ids, None, violations)

    def text(self, text: str, field: str = "text") -> str:
        """Check the length of a text that is to be tokenized."""
        violations = self._text_violations(text, field)
        if violations:
            raise InvalidRequestError(violations)
        return text

    def token_ids(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Check token ids that are to become text."""
        most = self._limits.max_model_len
        if len(token_ids) > most:
            violations = [Violation("token_ids", f"{len(token_ids)} ids", f"at most {most}")]
        else:
            violations = list(token_violations("token_ids", token_ids, self._limits))
        if violations:
            raise InvalidRequestError(violations)
        return token_ids

    def _token_ids(
        self,
        form: str | None,
        request: pb.GenerateRequest | pb.CompleteRequest | pb.ScoreRequest,
        field: str,
    ) -> tuple[list[int], list[Violation]]:
        if form is None:
            return [], [Violation(field, "unset", "text or token_ids")]
        if form == "token_ids":
            return list(request.token_ids.ids), []
        if not request.text:
            return [], [Violation(f"{field}.text", "empty", "at least one character")]
        violations = self._text_violations(request.text, f"{field}.text")
        if violations:
            return [], violations
        return self._tokenizer.encode(request.text), []

    def _text_violations(self, text: str, field: str) -> list[Violation]:
        num_bytes = len(text.encode())
        if num_bytes <= self._max_text_bytes:
            return []
        return [Violation(field, f"{num_bytes} bytes long", f"at most {self._max_text_bytes}")]

    def _call(
        self,
        request: pb.GenerateRequest | pb.CompleteRequest | pb.ScoreRequest,
        token_ids: list[int],
        params: SamplingParams | None,
        violations: list[Violation],
    ) -> Call:
        violations = [*violations, *_envelope_violations(request)]
        if violations:
            raise InvalidRequestError(violations)
        timeout = _seconds(request.timeout) if request.HasField("timeout") else None
        return Call(
            request_id=request.request_id or uuid.uuid4().hex,
            engine_request=EngineRequest(token_ids, params, request.priority, timeout),
        )


def _envelope_violations(
    request: pb.GenerateRequest | pb.CompleteRequest | pb.ScoreRequest,
) -> Iterator[Violation]:
    if len(request.request_id) > MAX_REQUEST_ID_CHARS or not request.request_id.isprintable():
        yield Violation(
            "request_id",
            f"{len(request.request_id)} characters long or not printable",
            f"at most {MAX_REQUEST_ID_CHARS} printable characters",
        )
    if abs(request.priority) > MAX_ABS_PRIORITY:
        yield Violation(
            "priority", str(request.priority), f"{-MAX_ABS_PRIORITY} to {MAX_ABS_PRIORITY}"
        )
    if request.HasField("timeout") and not 0 < _seconds(request.timeout) <= MAX_TIMEOUT_SECONDS:
        yield Violation(
            "timeout",
            f"{_seconds(request.timeout):g} s",
            f"more than 0 s, at most {MAX_TIMEOUT_SECONDS:g} s",
        )


def _sampling_params(sampling: pb.SamplingParams) -> SamplingParams:
    """What is set replaces the default; an unset scalar is not 0."""
    scalars = {
        name: getattr(sampling, name)
        for name in (
            "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p",
            "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "ignore_eos",
            "logprobs",
        )
        if sampling.HasField(name)
    }  # fmt: skip
    return SamplingParams(
        **scalars,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        logit_bias=dict(sampling.logit_bias),
        allowed_token_ids=tuple(sampling.allowed_token_ids),
    )


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
        usage=pb.Usage(
            prompt_tokens=finish.usage.prompt_tokens,
            completion_tokens=finish.usage.completion_tokens,
            cached_tokens=finish.usage.cached_tokens,
        ),
        timings=pb.Timings(
            queue=_duration(finish.timings.queue),
            prefill=_duration(finish.timings.prefill),
            first_token=_duration(finish.timings.first_token),
            total=_duration(finish.timings.total),
        ),
    )


def model_description(engine: Engine) -> models_pb2.GetModelResponse:
    config = engine.model_config
    model = engine.model_runner.model
    dtype = str(model.dtype).removeprefix("torch.")
    return models_pb2.GetModelResponse(
        name=config.name,
        family=config.family,
        num_layers=config.num_layers,
        layers=[
            models_pb2.LayerHeads(
                num_heads=heads.num_heads,
                num_kv_heads=heads.num_kv_heads,
                head_dim=heads.head_dim,
            )
            for heads in config.layers
        ],
        vocab_size=config.vocab_size,
        max_model_len=engine.max_model_len,
        dtype=dtype,
        device=str(model.device),
        kv_bytes_per_token=engine.kv_bytes_per_token,
        backend=model.kernel_name,
        kv_block_size=engine.config.block_size,
        kv_blocks_total=engine.kv_cache.num_pages,
        max_num_seqs=engine.config.max_num_seqs,
        max_num_batched_tokens=engine.config.max_num_batched_tokens,
        eos_token_ids=config.eos_token_ids,
        num_parameters=model.num_parameters,
    )


def load_description(load: EngineLoad) -> models_pb2.GetLoadResponse:
    return models_pb2.GetLoadResponse(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        kv_blocks_total=load.kv_blocks_total,
        kv_blocks_used=load.kv_blocks_used,
        kv_blocks_cached=load.kv_blocks_cached,
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
